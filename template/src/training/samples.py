"""A few answers before the first step and at each evaluation: what a loss cannot say."""

import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.rows import read_rows
from src.data.sources import expand
from src.models.generation import Prompt, generate
from src.training.checkpoint import TrainState
from src.training.report import say
from src.training.strategy import within
from src.utils.distributed import is_main
from src.utils.environment import from_root
from src.utils.errors import RunError, UserError


def sample_prompts(config: Config) -> list[Prompt]:
    """What `evaluation` asks; nothing where there is no evaluation."""
    if not (config.data.eval or config.training.overfit):
        return []
    if config.evaluation.prompts:
        return list(config.evaluation.prompts)
    own = isinstance(config.data.eval, str | list) and config.training.overfit is None
    source = expand(config.data.eval if own else config.data.train)[0]
    return [asked for asked, _ in questions(source, config, config.evaluation.samples)]


def questions(source: str, config: Config, limit: int) -> list[tuple[list[dict], str]]:
    """The first so many rows: what comes before the first answer, and that answer."""
    found = []
    for row in islice(read_rows(source, config.data), limit):
        messages = row.get("messages", [])
        roles = [message["role"] for message in messages]
        if "assistant" in roles:  # plain text asks nothing
            at = roles.index("assistant")
            found.append((messages[:at], (messages[at].get("content") or "").strip()))
    return found


def start_asking(
    objective: nn.Module, tokenizer: Tokenizer, config: Config, state: TrainState,
    dtype: torch.dtype,
) -> Callable[[], None]:  # fmt: skip
    """Ask before the first step; return what asks again."""
    asks = partial(_ask, objective, tokenizer, sample_prompts(config), config, state, dtype)
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
        say(f"asked      nothing: {error}")
        return
    pairs = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    if is_main():
        with (from_root(config.output_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
            line = {"step": state.step, "samples": pairs}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    say(f"asked      {_short(prompts[0])} → {_short(answers[0])}")


def prove_overfitted(
    model: PreTrainedModel, config: Config, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Ask for the first answer that was learnt: mask, template and stop token in one look.

    Raises:
        RunError: the model says something else.
    """
    for asked, wanted in questions(expand(config.data.train)[0], config, 1):
        room = len(tokenizer(wanted)["input_ids"]) + 20  # to run on, if nothing stops it
        answer = generate(model, tokenizer, [asked], max_length=room, dtype=dtype)[0]
        if answer != wanted:
            raise RunError(
                f"overfit not passed: row 1 says {wanted!r}, the model {answer!r}. If the loss "
                "above is near zero, the template or its stop token is wrong; else train longer"
            )
        say("overfit    passed: the first row's answer comes back word for word, and ends")


def _short(said: Any) -> str:
    text = said if isinstance(said, str) else said[-1]["content"]
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:60]} …")
