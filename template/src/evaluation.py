"""How good a trained model is on rows that it has not seen, and how much better than its base."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.batching import padded_loader
from src.data.sources import expand
from src.models.generation import generate
from src.models.model import position_limit
from src.training.samples import questions
from src.training.trainer import evaluate
from src.utils.device import pick_dtype


@dataclass
class Score:
    """Of one model on one set of rows.

    Attributes:
        loss: cross entropy per labelled token, in nats.
        perplexity: its exponential.
        exact: the share of answers that are the row's own, blanks at both ends aside.
        contains: the share that have it somewhere in them.
        answers: of the rows that were asked.
    """

    loss: float
    perplexity: float
    exact: float
    contains: float
    answers: list[str]


def score(
    model: PreTrainedModel, tokenizer: Tokenizer, config: Config, asked: list[tuple[Any, str]],
    max_length: int,
) -> Score:  # fmt: skip
    """Loss on all rows of `data.train`, and answers to some.

    Args:
        model: from `load_trained`.
        tokenizer: its own.
        config: whose `data` names the rows, and says how they are read.
        asked: prompts, each with the answer that is wanted.
        max_length: tokens of an answer at most.
    """
    loader = padded_loader(config.data.train, tokenizer, config)
    dtype = pick_dtype(config.model.dtype, model.device)
    found = evaluate(model, loader, model.device, dtype)
    answers = generate(model, tokenizer, [prompt for prompt, _ in asked], max_length)
    pairs = [(a, wanted) for a, (_, wanted) in zip(answers, asked, strict=True)]
    exact, contains = (
        sum(map(right, pairs)) / max(len(pairs), 1)
        for right in (lambda p: p[0].strip() == p[1], lambda p: p[1] in p[0])
    )
    return Score(found.loss, found.perplexity, exact, contains, list(answers))


def compare(
    model: PreTrainedModel, tokenizer: Tokenizer, config: Config, samples: int, max_length: int
) -> dict[str, Any]:
    """Scores of the model and, where it has adapters, of its base: as plain data."""
    longest = min(config.data.max_length, position_limit(model) or config.data.max_length)
    data = config.data.model_copy(update={"max_length": longest})
    config = config.model_copy(update={"data": data})
    asked = questions(expand(config.data.train), config, samples, tokenizer)
    scores = {"model": score(model, tokenizer, config, asked, max_length)}
    if hasattr(model, "peft_config"):
        adapted: Any = model
        with torch.no_grad(), adapted.disable_adapter():
            scores["base"] = score(model, tokenizer, config, asked, max_length)
    rows = [
        {"prompt": prompt["messages"], "wanted": wanted}
        | {name: each.answers[n] for name, each in scores.items()}
        for n, (prompt, wanted) in enumerate(asked)
    ]
    figures = {k: {n: v for n, v in asdict(s).items() if n != "answers"} for k, s in scores.items()}
    return {"data": config.data.train, "scores": figures, "samples": rows}


def as_markdown(found: dict[str, Any]) -> str:
    """The same as two tables to read."""
    names = ("loss", "perplexity", "exact", "contains")
    lines = [f"# Evaluation on {found['data']}", "", f"| | {' | '.join(names)} |"]
    lines += ["|---|" + "---:|" * len(names)]
    for name, figures in found["scores"].items():
        lines.append(f"| {name} | {' | '.join(f'{figures[n]:.4g}' for n in names)} |")
    columns = ["prompt", "wanted", *found["scores"]]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found["samples"]:
        lines.append(f"| {' | '.join(_cell(row[column]) for column in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else value[-1]["content"]
    text = " ".join(text.replace("|", "\\|").split())
    return text if len(text) <= 200 else f"{text[:200]} …"
