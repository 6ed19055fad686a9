"""Evaluate a trained model: `uv run scripts/evaluate.py MODEL DATA [--samples N]`.

Prints loss, perplexity and the share of right answers on DATA (a file or hub dataset of the shapes
that training reads), beside those of the base of an adapter, and writes evaluation.md and .json.
MODEL is what scripts/inference.py takes. Benchmarks: see "How good is it?" in README.md.
"""

import argparse
import json
import sys
from pathlib import Path

from src.preflight import find_trained
from src.utils.environment import load_environment
from src.utils.errors import run_script
from src.utils.imports import quick_imports


def main(arguments: list[str]) -> None:
    """Check model and rows first, then import torch."""
    options = _parse(arguments)
    load_environment()
    from src.config import Config, DataConfig, ModelConfig, load_config
    from src.data.rows import check_source
    from src.data.sources import expand

    name = find_trained(options.model, options.base)
    folder = Path(name) if Path(name).is_dir() else Path("outputs") / name.replace("/", "-")
    recipe = folder / "training_config.yaml"
    data = load_config(recipe)[0].data if recipe.is_file() else DataConfig(train=options.data)
    trained_on = [data.train] if isinstance(data.train, str) else data.train
    if recipe.is_file() and options.data in trained_on:
        print(f"warning: {options.data} is what the model was trained on", file=sys.stderr)
    data = data.model_copy(update={"train": options.data, "eval": None, "packing": False})
    for source in expand(options.data):
        check_source("DATA", source, data)
    config = Config(output_dir=str(folder), model=ModelConfig(name=name), data=data)

    with quick_imports():
        from src.evaluation import as_markdown, compare
        from src.trained import load_trained
        from src.training.tracking import send_evaluation
        from src.utils.device import pick_device
        from src.utils.files import write_text

    device = pick_device(options.device)
    model, tokenizer = load_trained(name, device, options.base)
    found = compare(model, tokenizer, config, options.samples, options.max_length)
    text = as_markdown(found)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "evaluation.md", text)
    write_text(folder / "evaluation.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    send_evaluation(folder, found["scores"]["model"], [folder / "evaluation.md"])


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uv run scripts/evaluate.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", help="what is evaluated")
    add("data", help="rows with answers")
    add("--samples", type=int, default=20, help="rows whose questions are asked")
    add("--max-length", type=int, default=256, help="tokens of an answer at most")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--base", help="the adapter's base model, if it has moved")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(main)
