"""Ask a trained model: `uv run scripts/inference.py MODEL [PROMPT…]` prints its answers only.

MODEL is a run's folder, its final/, a checkpoint, any saved model, a hub id or an MLflow URI.
Without prompts one is read from standard input. A file of rows is answered in order, and a command
that was stopped goes on where it was:
  uv run scripts/inference.py outputs/train --input rows.jsonl --output answers.jsonl
A conversation, word by word: uv run scripts/inference.py outputs/train --chat
The likeliest answer, unless a temperature is given; the base's generation_config.json does not act.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from src.trained import find_trained, load_trained, trained_config
from src.utils.errors import UserError
from src.utils.script import make_parser, quick_imports, run_script


def main(arguments: list[str]) -> None:
    """Check the folder and the rows first, then import torch."""
    options = _parse(arguments)
    name = find_trained(options.model, options.base)
    prompts, done, total = _prompts(options), 0, 0
    if options.input:
        from src.config import DataConfig
        from src.data.answers import answer_rows, check_answers

        trained = trained_config(name)  # rows are read as the run read its own
        data = trained.data if trained else DataConfig(train="-")
        done, total = check_answers(options.input, Path(options.output), data)

    with quick_imports():
        from src.models.generation import generate
        from src.models.model import stops_of
        from src.utils.device import pick_device
        from src.utils.seed import set_seed

    device = pick_device(options.device)
    model, tokenizer = load_trained(name, device, options.base, options.quantization)
    set_seed(options.seed + done)  # a file that goes on draws new random numbers
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    answer: Any = partial(
        generate, model, tokenizer, max_length=options.max_length, raw=options.raw,
        batch_size=options.batch_size, **sampling,
    )  # fmt: skip
    if options.chat:
        _chat(answer, tokenizer, stops_of(model, tokenizer), options.system)
    elif options.input:
        answer_rows(options.input, Path(options.output), data, done, total, answer)
    else:
        print(*answer([_messages(options.system, prompt) for prompt in prompts]), sep="\n")


def _prompts(options: argparse.Namespace) -> list[str]:
    """Those of the command line, or one from standard input.

    Raises:
        UserError: there is none, or one is empty; or options contradict each other.
    """
    ways = [bool(options.prompt), bool(options.input), options.chat]
    if sum(ways) > 1 or bool(options.input) != bool(options.output):
        raise UserError("give prompts, or --input with --output, or --chat")
    if options.system and (options.raw or options.input):
        raise UserError("--system goes with prompts or --chat; rows of --input bring their own")
    if options.chat or options.input:
        return []
    prompts = list(options.prompt) or [sys.stdin.read()]
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("an empty prompt: there is nothing to answer")
    return prompts


def _messages(system: str | None, prompt: str) -> Any:
    """A prompt as `generate` takes it, with a system turn if there is one."""
    if not system:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _chat(answer: Callable[..., str], tokenizer: Any, stops: list[int], system: str | None) -> None:
    """A conversation, until an empty line or the end of input."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Prints an answer as it comes, without the stop token at its end."""

        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value) not in stops:
                super().put(value)

    streamer = Streamer(tokenizer, skip_prompt=True)
    messages = [{"role": "system", "content": system}] if system else []
    while said := _line("you: "):
        messages.append({"role": "user", "content": said})
        text = answer(messages, streamer=streamer)
        messages.append({"role": "assistant", "content": text})


def _line(ask: str) -> str:
    try:
        return input(ask).strip()
    except EOFError:
        return ""


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", help="what answers; see above")
    add("prompt", nargs="*", help="a question; several are answered as a batch")
    add("--system", help="a system turn before the first question")
    add("--input", help="a file of rows with `messages` or `prompt`, of any size")
    add("--output", help="where its rows go, with their answers as `generated`")
    add("--chat", action="store_true", help="a conversation; an empty line ends it")
    add("--max-length", type=_at_least(1, int), default=256, help="new tokens at most")
    add("--batch-size", type=_at_least(1, int), default=16, help="prompts at a time")
    add("--raw", action="store_true", help="continue the text, without template")
    add("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest, up to this sum")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--base", help="the adapter's base model, if it has moved")
    bits = "of the base model; as it was trained, if not given"
    add("--quantization", choices=["4bit", "8bit", "none"], help=bits)
    return parser.parse_intermixed_args(arguments)  # options may stand before the prompt


def _at_least(least: int, kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if (value := kind(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return parse


if __name__ == "__main__":
    run_script(main)
