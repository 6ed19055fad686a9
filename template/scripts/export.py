"""Make one model folder of a run, to publish or to serve: `uv run scripts/export.py RUN OUT`.

An adapter is merged into its base in full precision, on the CPU. The merged model is compared
with base and adapter on the run's own rows (on other tokens if they cannot be read): if more than
rounding changed, nothing is written. The folder's README.md is a model card.
`--push org/name` uploads the folder to the hub, to a private repository unless --public is given.
"""

from pathlib import Path

from src.trained import find_trained, make_parser
from src.utils.errors import RunError, UserError, first_line
from src.utils.files import RECIPE, new_folder
from src.utils.script import run_script


def main(arguments: list[str]) -> None:
    """Check the folders first, then import torch."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or its final/")
    add("out", metavar="OUT", type=Path, help="the folder to write; it must not exist yet")
    add("--base", help="folder or hub id of the adapter's base model, if it has moved")
    add("--push", metavar="ORG/NAME", help="upload the folder to this repository of the hub")
    add("--public", action="store_true", help="make that repository public (default: private)")
    options = parser.parse_args(arguments)
    found, out = find_trained(options.run, options.base), options.out
    if not Path(found.name, RECIPE).is_file():
        raise UserError(f"{options.run}: not the result of a finished run: no {RECIPE} in it")
    if out.exists():
        raise UserError(f"{out}: exists already; nothing is overwritten")

    from src.tools.export import export, write_card

    with new_folder(out) as new:
        result = export(found, new)
        write_card(found, new, options.push or str(out), result)
    print(result, f"written to {out}", sep="\n")
    if options.push:
        from huggingface_hub import create_repo, upload_folder

        try:
            create_repo(options.push, private=not options.public, exist_ok=True)
            print(upload_folder(repo_id=options.push, folder_path=out))
        except Exception as error:  # noqa: BLE001 - each version of the hub's library has its own
            cure = f"{out} is whole: `uv run hf upload {options.push} {out}` repeats it"
            raise RunError(f"--push: {first_line(error)}; {cure}") from None


if __name__ == "__main__":
    run_script(main)
