"""Make one model folder of a run, to publish or to serve: `uv run scripts/export.py RUN OUT`.

An adapter is merged into its base in full precision, on the CPU. The merged model is compared
with base and adapter on the run's own rows (on other tokens if they cannot be read): if more than
rounding changed, nothing is written. The folder's README.md is a model card.
`--push org/name` uploads the folder to the hub, to a private repository unless --public is given.
"""

import argparse
from pathlib import Path

from src.trained import find_trained, trained_config
from src.utils.errors import RunError, UserError, first_line
from src.utils.files import CHECKPOINT, RECIPE, new_folder, write_problem
from src.utils.script import make_parser, run_script


def main(arguments: list[str]) -> None:
    """Check the folders first, then import torch."""
    options = _parse(arguments)
    folder, out = Path(find_trained(options.run, options.base)), Path(options.out)
    config = trained_config(str(folder))
    if (folder / CHECKPOINT).is_file():
        raise UserError(f"{options.run}: a checkpoint; finish its run, then export that")
    if config is None or not (folder / RECIPE).is_file():
        raise UserError(f"{options.run}: no {RECIPE} in it: not the result of a run")
    if out.exists():
        raise UserError(f"{out}: exists already; nothing is overwritten")
    if problem := write_problem(out):
        raise UserError(problem)

    from src.tools.export import export, serving_advice, write_card

    with new_folder(out) as new:
        result = export(folder, new, options.base, config)
        write_card(folder, new, options.push or str(out), result)
    commands = serving_advice(folder, out, options.base)
    print(result, f"written to {out}; to serve it:", *commands, sep="\n")
    if options.push:
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            api.create_repo(options.push, private=not options.public, exist_ok=True)
            print(api.upload_folder(repo_id=options.push, folder_path=str(out)))
        except Exception as error:  # noqa: BLE001 - each version of the hub's library has its own
            cure = f"`uv run hf upload {options.push} {out}` repeats it"
            raise RunError(f"--push: {first_line(error)}; {out} is whole: {cure}") from None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or its final/")
    add("out", metavar="OUT", help="the folder to write; it must not exist yet")
    add("--base", help="folder or hub id of the adapter's base model, if it has moved")
    add("--push", metavar="ORG/NAME", help="upload the folder to this repository of the hub")
    add("--public", action="store_true", help="make that repository public (default: private)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(main)
