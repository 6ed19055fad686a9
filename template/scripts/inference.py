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

from src.config import changed
from src.data.answers import answer_rows, check_answers
from src.trained import Trained, between, find_trained, load_trained, make_model_parser
from src.utils.environment import to_root
from src.utils.errors import UserError
from src.utils.script import quick_imports, run_script

WAYS = ({"prompt", "system"}, {"prompt", "raw"}, {"chat", "system"}, {"input", "output", "prompt"})


def main(arguments: list[str]) -> None:
    """Check the folder and the rows first, then import torch."""
    options = _parse(arguments)
    found, prompts, done = find_trained(options.model, options.base), [], 0
    system = [{"role": "system", "content": options.system}] if options.system else []
    if options.input:
        # Rows are read as the run read its own.
        data = changed(found.config, options.prompt, "data.").data
        by = _describe(found, options)
        done, total = check_answers(options.input, options.output, data, by)
    elif not options.chat:
        prompts = _prompts(options, system)

    with quick_imports():
        from src.models.generation import generate
        from src.utils.device import pick_device
        from src.utils.seed import set_seed

    model, tokenizer = load_trained(found, pick_device(options.device), options.quantization)
    set_seed(options.seed + done)  # a file that goes on draws new random numbers
    answer: Any = partial(
        generate, model, tokenizer, max_length=options.max_length, batch_size=options.batch_size,
        temperature=options.temperature, top_p=options.top_p,
    )  # fmt: skip
    if options.input:
        answer_rows(options.input, options.output, data, by, done, total, answer)
    elif options.chat:
        _chat(answer, tokenizer, system)
    else:
        print(*answer(prompts), sep="\n")


def _prompts(options: argparse.Namespace, system: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return those of the command line, or one from standard input, as rows.

    Raises:
        UserError: a prompt is empty.
    """
    prompts = options.prompt or [sys.stdin.read()]
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("an empty prompt: there is nothing to answer")
    if options.raw:
        return [{"text": prompt} for prompt in prompts]
    return [{"messages": [*system, {"role": "user", "content": prompt}]} for prompt in prompts]


def _describe(found: Trained, options: argparse.Namespace) -> str:
    """Name the model and the options that decide what it answers."""
    names = ("max_length", "temperature", "top_p", "seed", "base", "quantization")
    digest = sha256()
    for file in sorted(Path(found.name).rglob("*.safetensors")):
        with file.open("rb") as opened:  # the end of each file: quick, and training changes it
            opened.seek(max(file.stat().st_size - 2**20, 0))
            digest.update(opened.read())
    words = [f"{name}={getattr(options, name)}" for name in names if getattr(options, name)]
    return " ".join([to_root(Path(found.name)), digest.hexdigest()[:8], *words])


def _chat(answer: Callable[..., str], tokenizer: Any, messages: list[dict[str, str]]) -> None:
    """Hold a conversation until an empty line or the end of input."""
    from transformers import TextStreamer

    from src.data.encoding import stop_token_ids

    class Streamer(TextStreamer):
        """Prints an answer as it comes, without the stop token at its end."""

        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value) not in stops:
                super().put(value)

    stops = stop_token_ids(tokenizer)
    streamer = Streamer(tokenizer, skip_prompt=True)
    with suppress(EOFError):
        while said := input("you: ").strip():
            messages.append({"role": "user", "content": said})
            text = answer({"messages": messages}, streamer=streamer)
            messages.append({"role": "assistant", "content": text})


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, default = make_model_parser(__doc__), "(default: %(default)s)"
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="*", help="a question; several are answered as a batch")
    add("--system", help="a system turn before the first question")
    add("--input", help="a file of rows: `messages`, `prompt`, or `text` to be continued")
    add("--output", type=Path, help="its rows with answers as `generated` (default: printed)")
    add("--chat", action="store_true", help="a conversation; an empty line ends it")
    add("--batch-size", type=between(1, 2**31), default=16, help=f"prompts at a time {default}")
    add("--raw", action="store_true", help="continue the prompt, without the chat template")
    heat, share = between(0, math.inf, float), between(0, 1, float)
    add("--temperature", type=heat, default=0.0, help=f"above 0, tokens are sampled {default}")
    add("--top-p", type=share, default=1.0, help=f"from the likeliest of this sum {default}")
    add("--seed", type=between(0, 2**31), default=0, help=f"seed for sampling {default}")
    bits = "of the base model (default: as it was trained)"
    add("--quantization", choices=["4bit", "8bit", "none"], help=bits)
    options = parser.parse_intermixed_args(arguments)  # options may stand before the prompt
    given = {name for name in set().union(*WAYS) if getattr(options, name)}
    if not any(given <= way for way in WAYS) or (options.output and not options.input):
        raise UserError("give prompts (--system or --raw), --chat (--system) or --input (--output)")
    return options


if __name__ == "__main__":
    run_script(main)
