"""A few answers before the first step and at each evaluation: what a loss cannot say."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from textwrap import shorten

from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.chat import render
from src.data.dataset import read_part, rows_to_evaluate
from src.data.encoding import stop_token_ids
from src.data.rows import Row, carries_loss
from src.models.generation import generate
from src.training.checkpoint import Run
from src.training.report import Recorder, say
from src.training.strategy import run_on_model
from src.utils.errors import RunError, UserError


def sample_prompts(config: Config, tokenizer: Tokenizer) -> list[Row]:
    """The prompts of `evaluation`: those that it names, or of the first rows to evaluate on."""
    if texts := config.evaluation.prompts:
        return [{"messages": [{"role": "user", "content": text}]} for text in texts]
    sources, part = rows_to_evaluate(config)
    rows = read_part(sources, config.data, part) if sources else []
    return [row for row, _ in islice(questions(rows, tokenizer), config.evaluation.samples)]


def questions(rows: Iterable[Row], tokenizer: Tokenizer) -> Iterator[tuple[Row, str]]:
    """The rows that ask something, up to their first answer that trains; and that answer.

    Args:
        rows: as `read_part` returns them.
        tokenizer: its template says what belongs to an answer, such as calls of tools.
    """
    for row in rows:
        messages = row.get("messages", [])
        turns = enumerate(messages)
        at = next((n for n, m in turns if n and m["role"] == "assistant" and carries_loss(m)), None)
        if at is None:
            continue
        try:
            rendered = render(messages[: at + 1], row["tools"], tokenizer)
        except ValueError:  # such rows are named, or left out, where they are tokenised
            continue
        if rendered.spans:
            answer = rendered.text[slice(*rendered.spans[-1])].strip()
            for token in tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)):
                answer = answer.removesuffix(token)
            yield row | {"messages": messages[:at]}, answer.strip()


def make_sampler(run: Run, recorder: Recorder) -> Callable[[], None]:
    """Return what appends answers to `samples.jsonl` and prints the first; called before step 1."""
    config, tokenizer, state = run.config, run.tokenizer, run.state
    prompts, length = sample_prompts(config, tokenizer), config.evaluation.max_length
    asked = [row["messages"] for row in prompts]

    def sample() -> None:
        if not prompts:
            return
        try:
            answers = run_on_model(
                run.objective, generate, tokenizer, prompts, length, dtype=run.dtype
            )
        except UserError as error:  # training cuts a row, but its question is asked as a whole
            say(f"sample     none: {error}")
            return
        pairs = [{"prompt": p, "answer": a} for p, a in zip(asked, answers, strict=True)]
        recorder.append("samples.jsonl", {"step": state.step, "samples": pairs})
        when = " (before training)" * (state.step == 0)
        say(f"sample     {_short(asked[0][-1]['content'])} → {_short(answers[0])}{when}")

    if state.step == 0:
        sample()
    return sample


def check_overfit(run: Run) -> None:
    """Check that the model gives the first answer that it trained on: mask, template, stop token.

    Raises:
        RunError: it gives another answer.
    """
    data, tokenizer = run.config.data, run.tokenizer
    for row, expected in islice(questions(read_part(data.train, data), tokenizer), 1):
        room = len(tokenizer(expected)["input_ids"]) + 20  # to run on, if nothing stops it
        answer = run_on_model(run.objective, generate, tokenizer, row, room, dtype=run.dtype)
        if answer.strip() != expected:
            raise RunError(
                f"overfit not passed: row 1 says {expected!r}, the model {answer!r}. If the loss "
                "above is near zero, the template or its stop token is wrong; else train longer"
            )
        say("overfit    passed: the first row's answer comes back word for word, and ends")


def _short(text: str) -> str:
    return repr(shorten(text, 62, placeholder=" …"))
