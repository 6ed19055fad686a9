"""Make one model folder of a run, to publish or to serve: `uv run scripts/export.py RUN OUT`.

RUN is a run's folder or its final/. An adapter is merged into its base in full precision, on the
CPU, and compared with it on the run's own rows: what changed more than rounding is not written.
`--push org/name` uploads it to the hub, to a private repository unless --public is given.
"""

import argparse
from pathlib import Path

from src.preflight import find_trained
from src.utils.environment import load_environment
from src.utils.errors import UserError, run_script
from src.utils.imports import quick_imports


def main(arguments: list[str]) -> None:
    """Check the folders first, then import torch."""
    options = _parse(arguments)
    load_environment()
    from src.config import load_config

    folder, out = Path(find_trained(options.run, options.base)), Path(options.out)
    recipe = folder / "training_config.yaml"
    if not recipe.is_file():
        raise UserError(f"{options.run}: no training_config.yaml: not the result of a run")
    if out.exists():
        raise UserError(f"{out}: exists already; nothing is overwritten")
    config = load_config(recipe)[0]

    with quick_imports():
        from src.export import export, say_memory, serving_advice, write_card
        from src.utils.files import new_folder

    print(say_memory(folder, options.base))
    with new_folder(out) as new:
        told = export(folder, new, options.base, config)
        write_card(folder, new, out.name, told)
    print(told, f"written to {out}; to serve it:", *serving_advice(folder, out), sep="\n")
    if options.push:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(options.push, private=not options.public, exist_ok=True)
        print(api.upload_folder(repo_id=options.push, folder_path=str(out)))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uv run scripts/export.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", help="a run's folder")
    add("out", help="a folder that does not exist yet")
    add("--base", help="the adapter's base model, if it has moved")
    add("--push", metavar="ORG/NAME", help="upload it")
    add("--public", action="store_true", help="for everybody to see")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(main)
