"""Compare runs: `uv run scripts/compare.py RUN RUN ... [--output PICTURE]`.

Prints in which settings, data, code and versions the runs differ and what each of them reached,
and draws the loss curves of all of them in one picture.
"""

from src.tools.compare import compare
from src.trained import find_runs, make_parser
from src.training.record import draw_curves
from src.utils.environment import from_root, to_root
from src.utils.errors import UserError
from src.utils.script import run_script

MAX_WIDTH = 40  # characters of a cell; the rest is cut off


def main(arguments: list[str]) -> None:
    """Print both tables and draw the curves."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder: outputs/train")
    default, text = "outputs/comparison.png", "the picture (default: %(default)s)"
    parser.add_argument("--output", default=default, help=text)
    options = parser.parse_args(arguments)
    folders, picture = find_runs(options.runs), from_root(options.output)
    if picture.suffix != ".png":
        raise UserError(f"--output {options.output}: the picture is a .png")
    names = [to_root(folder) for folder in folders]
    differences, results = compare(folders)
    _print_table({"differs in": names, **(differences or {"nothing": [""] * len(names)})})
    _print_table({"result": names, **results})
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(folders, picture)
    print(f"curves: {to_root(picture)}")


def _print_table(table: dict[str, list[str]]) -> None:
    rows = [[cell[:MAX_WIDTH] for cell in (name, *values)] for name, values in table.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print()


if __name__ == "__main__":
    run_script(main)
