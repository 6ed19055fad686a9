"""Ask a trained model: `uv run scripts/inference.py MODEL [PROMPT…]` prints its answers only.

MODEL is a run's folder, its final/, a checkpoint, any saved model, a hub id or an MLflow URI.
Without prompts one is read from standard input. A file of rows is answered in order, and a command
that was stopped goes on where it was. They are read as the run read its own, or with other keys:
  uv run scripts/inference.py outputs/train --input rows.jsonl --output answers.jsonl
  uv run scripts/inference.py outputs/train --input rows.csv data.columns.prompt=Question
A conversation, word by word: uv run scripts/inference.py outputs/train --chat
Answers are the likeliest tokens unless --temperature is given; the base's generation_config.json
is not used.
"""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from src.trained import find_trained, load_trained, trained_config
from src.utils.environment import to_root
from src.utils.errors import UserError
from src.utils.script import between, make_parser, quick_imports, run_script


def main(arguments: list[str]) -> None:
    """Check the folder and the rows first, then import torch."""
    options = _parse(arguments)
    name = find_trained(options.model, options.base)
    prompts, done, total = _prompts(options), 0, 0
    if options.input:
        from src.config import DataConfig, change_data
        from src.data.answers import answer_rows, check_answers

        trained = trained_config(name)  # rows are read as the run read its own
        data = trained.data if trained else DataConfig(train="-")
        data = change_data(data, options.prompt)
        by = _describe(name, options)
        done, total = check_answers(options.input, options.output, data, by)

    with quick_imports():
        from src.models.generation import generate
        from src.models.model import stops_of
        from src.utils.device import pick_device
        from src.utils.seed import set_seed

    device = pick_device(options.device)
    model, tokenizer = load_trained(name, device, options.base, options.quantization)
    set_seed(options.seed + done)  # a file that goes on draws new random numbers
    answer: Any = partial(
        generate, model, tokenizer, max_length=options.max_length, raw=options.raw,
        batch_size=options.batch_size, temperature=options.temperature, top_p=options.top_p,
    )  # fmt: skip
    if options.chat:
        _chat(answer, tokenizer, stops_of(model, tokenizer), options.system)
    elif options.input:
        answer_rows(options.input, options.output, data, by, done, total, answer)
    else:
        print(*answer(prompts), sep="\n")


def _prompts(options: argparse.Namespace) -> list[Any]:
    """Return those of the command line, or one from standard input, as messages.

    Raises:
        UserError: a prompt is empty, or options contradict each other.
    """
    ways = [bool(options.prompt) and not options.input, bool(options.input), options.chat]
    if sum(ways) > 1 or (options.output and not options.input):
        raise UserError("give prompts, or --chat, or --input with or without --output")
    if options.system and (options.raw or options.input):
        raise UserError("--system goes with prompts or --chat; rows of --input bring their own")
    if options.chat or options.input:
        return []
    prompts = options.prompt or [sys.stdin.read()]
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("an empty prompt: there is nothing to answer")
    return [[*options.system, {"role": "user", "content": prompt}] for prompt in prompts]


def _describe(name: str, options: argparse.Namespace) -> str:
    """Name the model and the options that decide what it answers."""
    names = ("max_length", "raw", "temperature", "top_p", "seed", "base", "quantization")
    given = [(key.replace("_", "-"), getattr(options, key)) for key in names]
    words = [f"--{key} {value}" for key, value in given if value not in {None, False, 1.0}]
    weights, digest = sorted(Path(name).rglob("*.safetensors")), sha256()
    for file in weights:  # the end of each file: quick, and training changes it
        with file.open("rb") as opened:
            opened.seek(max(file.stat().st_size - 2**20, 0))
            digest.update(opened.read())
    version = [digest.hexdigest()[:8]] * bool(weights)
    return " ".join([to_root(Path(name)), *version, *words])


def _chat(
    answer: Callable[..., str], tokenizer: Any, stops: list[int], messages: list[dict[str, str]]
) -> None:
    """Hold a conversation until an empty line or the end of input."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Prints an answer as it comes, without the stop token at its end."""

        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value) not in stops:
                super().put(value)

    streamer = Streamer(tokenizer, skip_prompt=True)
    with suppress(EOFError):
        while said := input("you: ").strip():
            messages.append({"role": "user", "content": said})
            text = answer(messages, streamer=streamer)
            messages.append({"role": "assistant", "content": text})


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, default = make_parser(__doc__), "(default: %(default)s)"
    add, count = parser.add_argument, between(1, 2**31)
    add("model", metavar="MODEL", help="see above")
    add("prompt", metavar="PROMPT", nargs="*", help="a question; several are answered as a batch")
    turn = lambda text: [{"role": "system", "content": text}]  # noqa: E731
    add("--system", type=turn, default=[], help="a system turn before the first question")
    add("--input", help="a file of rows: `messages`, `prompt`, or `text` to be continued")
    output = "the file that gets these rows with their answers as `generated` (default: printed)"
    add("--output", type=Path, help=output)
    add("--chat", action="store_true", help="a conversation; an empty line ends it")
    names, tokens = ("--max-length", "--max-new-tokens"), f"tokens of an answer at most {default}"
    add(*names, type=count, default=256, help=tokens)
    add("--batch-size", type=count, default=16, help=f"prompts at a time {default}")
    add("--raw", action="store_true", help="continue the prompt, without the chat template")
    heat = f"0: the likeliest token; above 0, tokens are sampled {default}"
    add("--temperature", type=between(0, math.inf, float), default=0.0, help=heat)
    nucleus = f"sample from the likeliest tokens that add up to this probability {default}"
    add("--top-p", type=between(0, 1, float), default=1.0, help=nucleus)
    add("--seed", type=between(0, 2**31), default=0, help=f"seed for sampling {default}")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help=default)
    add("--base", help="folder or hub id of the adapter's base model, if it has moved")
    bits = "of the base model (default: as it was trained)"
    add("--quantization", choices=["4bit", "8bit", "none"], help=bits)
    return parser.parse_intermixed_args(arguments)  # options may stand before the prompt


if __name__ == "__main__":
    run_script(main)
