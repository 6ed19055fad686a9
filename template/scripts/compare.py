"""Compare runs: `uv run scripts/compare.py RUN RUN ... [--output PICTURE]`.

RUN is the output folder of a run, such as outputs/train. Prints what differs in configuration,
data, code and versions, and what came of it, and draws the curves of all of them in one picture.
"""

import argparse

from src.utils.environment import from_root, load_environment, to_root
from src.utils.errors import UserError, run_script
from src.utils.imports import quick_imports

WIDEST = 40  # characters of a value


def main(arguments: list[str]) -> None:
    """Check the folders first, then import torch."""
    options = _parse(arguments)
    load_environment()
    folders = [from_root(name) for name in options.runs]
    if unknown := [folder for folder in folders if not (folder / "record.json").is_file()]:
        raise UserError(*(f"{it}: no record.json in it: not a run's folder" for it in unknown))
    if len(folders) < 2:
        raise UserError(f"two runs or more are compared, not {options.runs[0]} alone")

    with quick_imports():
        from src.comparison import differences, results
        from src.training.report import draw_curves

    names = [to_root(folder) for folder in folders]
    differ = differences(folders) or {"nothing": ["" for _ in folders]}
    _show({"differs in": names, **differ})
    _show({"came out": names, **results(folders)})
    output = from_root(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(folders, output)
    print(f"curves: {to_root(output)}")


def _show(table: dict[str, list[str]]) -> None:
    cells = [[name, *map(str, row)] for name, row in table.items()]
    cells = [[c if len(c) <= WIDEST else f"{c[: WIDEST - 2]} …" for c in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip())
    print()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uv run scripts/compare.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", default="outputs/comparison.png", help="the picture")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(main)
