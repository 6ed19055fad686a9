"""Ask a trained model: `uv run scripts/inference.py MODEL_DIR PROMPT…` prints its answers only."""

import argparse
from collections.abc import Callable
from pathlib import Path

from src.preflight import check_trained
from src.utils.environment import load_environment
from src.utils.errors import run_script
from src.utils.imports import quick_imports


def main(arguments: list[str]) -> None:
    """Check the folder first, then import torch."""
    options = _parse(arguments)
    load_environment()
    folder = Path(options.model_dir)
    check_trained(folder, options.base)

    with quick_imports():
        from transformers.utils import logging

        from src.models.generation import generate
        from src.models.model import load_trained
        from src.utils.device import pick_device
        from src.utils.seed import set_seed

    logging.disable_progress_bar()
    set_seed(options.seed)
    device = pick_device(options.device)
    model, tokenizer = load_trained(folder, device, options.base, options.quantization)
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    for answer in generate(
        model, tokenizer, list(options.prompt), options.max_length, raw=options.raw, **sampling
    ):
        print(answer)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uv run scripts/inference.py",
        description="Complete each prompt with a trained model; prints the completions only.",
    )
    add = parser.add_argument
    add("model_dir", help="a run's final folder: a full model or an adapter")
    add("prompt", nargs="+", help="a question; several are answered as a batch")
    add("--max-length", type=_at_least(1, int), default=256, help="new tokens at most")
    add("--raw", action="store_true", help="continue the text, without template")
    add("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest")
    add("--top-p", type=float, default=1.0, help="sample from this probability")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--base", help="the adapter's base model, if it has moved")
    bits = "of the base model; as it was trained, if not given"
    add("--quantization", choices=["4bit", "8bit", "none"], help=bits)
    return parser.parse_args(arguments)


def _at_least(least: int, kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if (value := kind(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return parse


if __name__ == "__main__":
    run_script(main)
