"""Ask a trained model: `uv run scripts/inference.py MODEL_DIR PROMPT…` prints its answers only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from src.utils.environment import load_environment
from src.utils.errors import UserError, run_script
from src.utils.imports import quick_imports


def main(arguments: list[str]) -> None:
    """Check the folder first, then import torch."""
    options = _parse(arguments)
    load_environment()
    folder = Path(options.model_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; training prints where its model is")
    files = {path.name for path in folder.iterdir()}
    if not files & {"config.json", "adapter_config.json"}:
        raise UserError(
            f"{folder}: no config.json or adapter_config.json: not a saved model"
            + (f"; did you mean {folder / 'final'}?" if "final" in files else "")
        )
    if not files & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}:
        raise UserError(f"{folder}: no tokenizer in it; save one with tokenizer.save_pretrained")
    if "adapter_config.json" in files:
        _check_base(folder, options.base)

    with quick_imports():
        from transformers.utils import logging

        from src.models.generation import generate
        from src.models.model import load_trained, pick_device
        from src.utils.seed import set_seed

    logging.disable_progress_bar()
    set_seed(options.seed)
    device = pick_device(options.device)
    model, tokenizer = load_trained(folder, device, options.base, options.quantization)
    answers = generate(
        model,
        tokenizer,
        list(options.prompt),
        options.max_length,
        raw=options.raw,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    for answer in answers:
        print(answer)


def _check_base(folder: Path, base: str | None) -> None:
    """A local base model that has moved is found out before torch is loaded."""
    name = base or json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path", ""
    )
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(f"{folder}: its base model was at {name}, and is not now; give --base")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uv run scripts/inference.py",
        description="Complete each prompt with a trained model; prints the completions only.",
    )
    parser.add_argument("model_dir", help="a run's final folder: a full model or an adapter")
    parser.add_argument("prompt", nargs="+", help="a question; several are answered as a batch")
    parser.add_argument("--max-length", type=_positive, default=256, help="new tokens at most")
    parser.add_argument("--raw", action="store_true", help="continue the text, without template")
    parser.add_argument("--temperature", type=_not_negative, default=0.0, help="0: the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--base", help="the adapter's base model, if it has moved")
    parser.add_argument(
        "--quantization",
        choices=["4bit", "8bit", "none"],
        help="of the base model; as it was trained, if not given",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _not_negative(text: str) -> float:
    if (value := float(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


if __name__ == "__main__":
    run_script(main)
