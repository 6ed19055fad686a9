"""Evaluate a trained model on rows that it has not seen, and compare it with its base."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config, changed
from src.data.batching import padded_loader
from src.data.dataset import read_part
from src.data.sources import expand
from src.models.generation import generate
from src.models.model import position_limit
from src.training.samples import questions
from src.training.trainer import evaluate
from src.utils.device import pick_dtype
from src.utils.files import write_text

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
        data: the rows' source. scores: of `model` and `base`, see `_score`. samples: for each row
        that was answered its prompt, the expected answer, and the answers of `model` and `base`.
    """
    longest = min(config.data.max_length, position_limit(model) or config.data.max_length)
    config = changed(config, f"data.max_length={longest}")
    rows = read_part(expand(config.data.train), config.data)
    pairs = questions(rows, samples, tokenizer)
    results = {"model": _score(model, tokenizer, config, pairs, max_length)}
    if hasattr(model, "peft_config"):
        adapted: Any = model
        with torch.no_grad(), adapted.disable_adapter():
            results["base"] = _score(model, tokenizer, config, pairs, max_length)
    rows = [{"prompt": prompt["messages"], "expected": expected} for prompt, expected in pairs]
    for name, (_, answers) in results.items():
        for row, answer in zip(rows, answers, strict=True):
            row[name] = answer
    scores = {name: figures for name, (figures, _) in results.items()}
    return {"data": config.data.train, "scores": scores, "samples": rows}


def _score(
    model: PreTrainedModel, tokenizer: Tokenizer, config: Config, pairs: list[tuple[Any, str]],
    max_length: int,
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """Compute the loss on all rows, and answer the prompts of some.

    Returns:
        loss: cross entropy per labelled token, in nats. perplexity: its exponential. exact: the
        share of answers that equal the expected one, blanks at both ends aside. contains: the
        share that contain it; neither where no row asks anything. And the answers.
    """
    loader = padded_loader(config.data.train, tokenizer, config)
    result = evaluate(model, loader, model.device, pick_dtype(config.model.dtype, model.device))
    answers = list(generate(model, tokenizer, [prompt for prompt, _ in pairs], max_length))
    graded = [(answer, right) for answer, (_, right) in zip(answers, pairs, strict=True)]
    figures = {"loss": result.loss, "perplexity": result.perplexity}
    if graded:
        figures["exact"] = sum(answer.strip() == right for answer, right in graded) / len(graded)
        figures["contains"] = sum(right in answer for answer, right in graded) / len(graded)
    return figures, answers


def write_evaluation(result: dict[str, Any], folder: Path) -> Path:
    """Write evaluation.json and evaluation.md; return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_text(folder / "evaluation.json", f"{text}\n")
    page = folder / "evaluation.md"
    write_text(page, as_markdown(result))
    return page


def as_markdown(result: dict[str, Any]) -> str:
    """Return a table of the scores, and one of the samples."""
    scores = result["scores"]
    figures = [["", *scores["model"]]]
    figures += [[name, *(f"{x:.4g}" for x in row.values())] for name, row in scores.items()]
    columns = ["prompt", "expected", *scores]
    samples = [columns, *([_cell(row[key]) for key in columns] for row in result["samples"])]
    answers = f"\n{_table(samples)}" * bool(result["samples"])
    return f"# Evaluation on {result['data']}\n\n{_table(figures)}{answers}"


def _table(rows: list[list[str]]) -> str:
    header, *body = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([header, "|---" * len(rows[0]), "|\n", *body])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else value[-1]["content"]
    text = " ".join(text.replace("|", "\\|").split())
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]} …"
