"""Evaluate a trained model: `uv run scripts/evaluate.py MODEL DATA [--samples N]`.

Prints loss, perplexity and the share of right answers on DATA (a file or hub dataset, read as in
training); for an adapter also those of its base. Writes them to evaluation.md and evaluation.json
beside the run (evaluation-step-N/ for a checkpoint), or into the folder of any other model.
MODEL is what scripts/inference.py takes. README.md, "Use the result", has the command for
standard benchmarks.
"""

import argparse
import sys
from pathlib import Path

from src.trained import find_trained, load_trained, trained_config
from src.utils.environment import from_root
from src.utils.files import CHECKPOINT, RECORD
from src.utils.script import between, make_parser, run_script


def main(arguments: list[str]) -> None:
    """Check model and rows first, then import torch."""
    options = _parse(arguments)
    from src.config import Config, DataConfig, ModelConfig, change_data
    from src.data.rows import check_source
    from src.data.sources import expand

    name = find_trained(options.model, options.base)
    folder = Path(name) if Path(name).is_dir() else from_root("outputs") / name.replace("/", "-")
    if folder.name == "final" and (folder.parent / RECORD).is_file():
        folder = folder.parent
    elif (folder / CHECKPOINT).is_file() and folder.parent.name == "checkpoints":  # it is pruned
        folder = folder.parent.with_name(f"evaluation-{folder.name}")
    trained = trained_config(name)
    data = trained.data if trained else DataConfig(train=options.data)
    if trained and options.data in ([data.train] if isinstance(data.train, str) else data.train):
        print(f"warning: {options.data} is what the model was trained on", file=sys.stderr)
    data = change_data(data, options.keys)
    data = data.model_copy(update={"train": options.data, "eval": None, "packing": False})
    for source in expand(options.data):
        check_source("DATA", source, data)
    config = Config(output_dir=str(folder), model=ModelConfig(name=name), data=data)

    from src.tools.evaluate import compare_with_base, write_evaluation
    from src.training.tracking import send_evaluation
    from src.utils.device import pick_device

    model, tokenizer = load_trained(name, pick_device(options.device), options.base)
    result = compare_with_base(model, tokenizer, config, options.samples, options.max_length)
    page = write_evaluation(result, folder)
    send_evaluation(Path(name), result["scores"]["model"], page)
    print(f"{page.read_text('utf-8')}Written to {page} and evaluation.json.")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, default = make_parser(__doc__), "(default: %(default)s)"
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run's folder, a checkpoint, a saved model or a hub id")
    add("data", metavar="DATA", help="rows with answers")
    keys = "how DATA is read, such as data.columns.prompt=Question (default: as in training)"
    add("keys", metavar="data.key=value", nargs="*", help=keys)
    add("--samples", type=between(0, 2**31), default=20, help=f"rows to answer {default}")
    names, tokens = ("--max-length", "--max-new-tokens"), f"tokens of an answer at most {default}"
    add(*names, type=between(1, 2**31), default=256, help=tokens)
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help=default)
    add("--base", help="folder or hub id of the adapter's base model, if it has moved")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    run_script(main)
