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

from src.config import changed
from src.data.rows import check_sources
from src.trained import Trained, between, find_trained, load_trained, make_model_parser
from src.utils.environment import from_root
from src.utils.files import RECORD
from src.utils.script import run_script


def main(arguments: list[str]) -> None:
    """Check model and rows first, then import torch."""
    options = _parse(arguments)
    found = find_trained(options.model, options.base)
    trained_on = found.config.data.train
    if options.data in ([trained_on] if isinstance(trained_on, str) else trained_on):
        print(f"warning: {options.data} is what the model was trained on", file=sys.stderr)
    data = changed(found.config, options.keys, "data.").data
    data = data.model_copy(update={"train": options.data})
    check_sources(options.data, data)
    folder, config = _folder_for(found), found.config.model_copy(update={"data": data})

    from src.tools.evaluate import compare_with_base, send_evaluation, write_evaluation
    from src.utils.device import pick_device

    model, tokenizer = load_trained(found, pick_device(options.device))
    result = compare_with_base(model, tokenizer, config, options.samples, options.max_length)
    page = write_evaluation(result, folder)
    send_evaluation(Path(found.name), result["scores"]["model"], page)
    print(f"{page.read_text('utf-8')}Written to {page} and evaluation.json.")


def _folder_for(found: Trained) -> Path:
    """Where the evaluation of a model is written: not into a checkpoint, which is pruned."""
    folder = Path(found.name)
    if not folder.is_dir():
        return from_root("outputs") / found.name.replace("/", "-")
    if found.kind == "checkpoint":
        return folder.parent.with_name(f"evaluation-{folder.name}")
    return folder.parent if (folder.parent / RECORD).is_file() else folder


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_model_parser(__doc__)
    add = parser.add_argument
    add("data", metavar="DATA", help="rows with answers")
    keys = "how DATA is read, such as data.columns.prompt=Question (default: as in training)"
    add("keys", metavar="data.key=value", nargs="*", help=keys)
    samples = "rows to answer (default: %(default)s)"
    add("--samples", type=between(0, 2**31), default=20, help=samples)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    run_script(main)
