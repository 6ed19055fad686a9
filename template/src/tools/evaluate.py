"""Evaluate a trained model on rows that it has not seen, and compare it with its base."""

import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.batching import TokenLoader
from src.data.dataset import load_tokens, read_part
from src.models.generation import generate
from src.models.model import position_limit
from src.preflight import read_json
from src.training.record import read_record
from src.training.samples import questions
from src.training.tracking import connect, explain
from src.training.trainer import evaluate, perplexity
from src.utils.device import pick_dtype
from src.utils.files import RECORD, write_text

MAX_CELL = 200  # characters of a prompt or an answer in a table


def compare_with_base(
    model: PreTrainedModel, tokenizer: Tokenizer, config: Config, samples: int, max_length: int
) -> dict[str, Any]:
    """Score the model and, if it has adapters, its base.

    Args:
        model: from `load_trained`.
        tokenizer: its own.
        config: its `data.train` names the rows; the rest of `data` says how to read them.
        samples: how many rows to answer.
        max_length: tokens of an answer at most.

    Returns:
        data: the rows' source, and rows: how many. samples: for each row that was answered its
        prompt, the expected answer, and the answers of `model` and `base`. scores: of both, on all
        rows loss (cross entropy per labelled token, in nats) and perplexity (its exponential); on
        the samples the share that is exact, blanks at both ends aside, and the share that contains
        the expected answer.
    """
    data, source, dtype = config.data, config.data.train, pick_dtype("auto", model.device)
    longest = min(data.max_length, position_limit(model.config) or data.max_length)
    config = config.model_copy(update={"data": data.model_copy(update={"max_length": longest})})
    documents = load_tokens(source, tokenizer, config.data)
    loader = TokenLoader(documents, config, tokenizer.pad_token_id)
    asked = [*islice(questions(read_part(source, data), tokenizer), samples)]
    rows: list[dict[str, Any]] = [
        {"prompt": row["messages"], "expected": expected} for row, expected in asked
    ]
    adapted: Any = model
    scores = {}
    for name in ("model", "base") if hasattr(model, "peft_config") else ("model",):
        with adapted.disable_adapter() if name == "base" else nullcontext():
            loss = evaluate(model, loader, model.device, dtype)
            answers = generate(model, tokenizer, [row for row, _ in asked], max_length)
        scores[name] = {"loss": loss, "perplexity": perplexity(loss)}
        for row, answer in zip(rows, answers, strict=True):
            row[name] = answer
        if rows:
            scores[name]["exact"] = fmean(row[name].strip() == row["expected"] for row in rows)
            scores[name]["contains"] = fmean(row["expected"] in row[name] for row in rows)
    return {"data": source, "rows": len(loader.dataset), "scores": scores, "samples": rows}


def write_evaluation(result: dict[str, Any], folder: Path) -> Path:
    """Write evaluation.json, and evaluation.md with tables of it; return the latter.

    Those of other data are renamed to evaluation-1.json and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, report = folder / "evaluation.md", folder / "evaluation.json"
    if report.is_file() and read_json(report).get("data") != result["data"]:
        number = 1 + len([*folder.glob("evaluation-*.json")])  # the report on other rows stays
        for file in (page, report):
            file.rename(file.with_stem(f"evaluation-{number}"))
    write_text(report, f"{json.dumps(result, indent=1, ensure_ascii=False)}\n")
    scores, samples = result["scores"], result["samples"]
    tables = [_table([{"": name, **row} for name, row in scores.items()]), _table(samples)]
    counts = f"Rows in loss: {result['rows']:,}; answered: the first {len(samples):,}.\n"
    write_text(page, "\n".join([f"# Evaluation on {result['data']}\n", *tables, counts]))
    return page


def send_evaluation(folder: Path, figures: dict[str, float], page: Path) -> None:
    """Add figures and a page to the MLflow run that made what is in `folder`, if there is one."""
    runs = [run for run in (folder.parent, folder.parent.parent) if (run / RECORD).is_file()]
    if not runs or not (run_id := read_record(runs[0]).get("mlflow")):
        return
    try:
        client = connect()
        for name, value in figures.items():
            client.log_metric(run_id, f"evaluation_{name}", value)
        client.log_artifact(run_id, str(page))
    except Exception as error:  # noqa: BLE001 - the files are written in any case
        print(f"warning: MLflow did not take the evaluation ({explain(error)})")


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as a table in Markdown."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [[*rows[0]], ["---"] * len(rows[0]), *cells] if rows else []
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    """A figure, a text or the last of several messages, in one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else value[-1]["content"]
    text = " ".join(text.replace("|", "\\|").split())
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]} …"
