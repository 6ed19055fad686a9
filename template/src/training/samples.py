"""A few answers before the first step and at each evaluation: what a loss cannot say."""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.chat import render
from src.data.dataset import evaluation_limit, row_hash
from src.data.encoding import stop_token_ids
from src.data.rows import read_rows, trains
from src.data.sources import expand
from src.models.generation import Prompt, generate
from src.training.checkpoint import TrainState
from src.training.report import say
from src.training.strategy import within
from src.utils.distributed import is_main
from src.utils.environment import from_root
from src.utils.errors import RunError, UserError


def sample_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """What `evaluation` asks; nothing where there is no evaluation."""
    data, overfit = config.data, config.training.overfit is not None
    if not (data.eval or overfit):
        return []
    if config.evaluation.prompts:
        return list(config.evaluation.prompts)
    share = isinstance(data.eval, float) and not overfit
    own = isinstance(data.eval, str | list) and not overfit
    sources = expand(data.eval if own else data.train)
    below = evaluation_limit(sources, data) if share else None
    asked = questions(sources, config, config.evaluation.samples, tokenizer, below)
    return [prompt for prompt, _ in asked]


def questions(
    sources: list[str], config: Config, limit: int, tokenizer: Tokenizer, below: int | None = None
) -> list[tuple[dict[str, Any], str]]:
    """The first so many rows: all before the first answer that trains, and what trains there.

    Args:
        sources: files or hub datasets.
        config: whose `data` says how rows are read.
        limit: rows at most.
        tokenizer: whose template says what the answer is: calls of tools are part of it.
        below: only rows with a `row_hash` below this: those that are held out.
    """
    found: list[tuple[dict[str, Any], str]] = []
    for row in chain.from_iterable(read_rows(name, config.data) for name in sources):
        if len(found) == limit:
            break
        messages, tools = row.get("messages", []), row.get("tools")
        at = next((n for n, message in enumerate(messages) if n and _answers(message)), None)
        if at is None or (below is not None and row_hash(row) >= below):
            continue  # plain text asks nothing, nor does who speaks first
        try:
            rendered = render(messages[: at + 1], tools, tokenizer)
        except ValueError:  # such rows are named, or left out, where they are tokenised
            continue
        if not rendered.spans:
            continue
        wanted = rendered.text[slice(*rendered.spans[-1])].strip()
        for token in tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)):
            wanted = wanted.removesuffix(token)
        found.append(({"messages": messages[:at], "tools": tools}, wanted.strip()))
    return found


def _answers(message: dict[str, Any]) -> bool:
    said = message["content"].strip() or message.get("tool_calls")
    return bool(message["role"] == "assistant" and trains(message) and said)


def start_asking(
    objective: nn.Module, tokenizer: Tokenizer, config: Config, state: TrainState,
    dtype: torch.dtype,
) -> Callable[[], None]:  # fmt: skip
    """Ask before the first step; return what asks again."""
    asks = partial(
        _ask, objective, tokenizer, sample_prompts(config, tokenizer), config, state, dtype
    )
    if state.step == 0:
        asks()
    return asks


def _ask(
    objective: nn.Module, tokenizer: Tokenizer, prompts: list[Prompt], config: Config,
    state: TrainState, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Let the model answer; append the answers to `samples.jsonl`, and show the first."""
    if not prompts:
        return
    length = config.evaluation.max_length
    try:
        answers = within(objective, generate, tokenizer, prompts, length, dtype=dtype)
    except UserError as error:  # a row is cut for training, but its question is asked whole
        say(f"sample     none: {error}")
        return
    asked = [p["messages"] if isinstance(p, dict) else p for p in prompts]
    pairs = [{"prompt": p, "answer": a} for p, a in zip(asked, answers, strict=True)]
    if is_main():
        with (from_root(config.output_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
            line = {"step": state.step, "samples": pairs}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    when = " (before training)" * (state.step == 0)
    say(f"sample     {_short(asked[0])} → {_short(answers[0])}{when}")


def prove_overfitted(
    model: PreTrainedModel, config: Config, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Ask for the first answer that was learnt: mask, template and stop token in one look.

    Raises:
        RunError: the model says something else.
    """
    for asked, wanted in questions(expand(config.data.train), config, 1, tokenizer):
        room = len(tokenizer(wanted)["input_ids"]) + 20  # to run on, if nothing stops it
        answer = generate(model, tokenizer, [asked], max_length=room, dtype=dtype)[0]
        if answer.strip() != wanted:
            raise RunError(
                f"overfit not passed: row 1 says {wanted!r}, the model {answer!r}. If the loss "
                "above is near zero, the template or its stop token is wrong; else train longer"
            )
        say("overfit    passed: the first row's answer comes back word for word, and ends")


def _short(said: Any) -> str:
    text = said if isinstance(said, str) else said[-1]["content"]
    text = re.sub("\ufffd+", "\ufffd", " ".join(text.split()))  # bytes that are no text
    return repr(text if len(text) <= 60 else f"{text[:60]} …")
