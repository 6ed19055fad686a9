"""Compare runs: `uv run scripts/compare.py RUN RUN ... [--output PICTURE]`.

Prints in which settings, data, code and versions the runs differ and what each of them reached,
and draws the loss curves of all of them in one picture.
"""

import json
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from src.config import flatten
from src.trained import find_runs, make_parser
from src.training.record import draw_curves, read_metrics, read_record
from src.utils.environment import from_root, to_root
from src.utils.errors import UserError, first_line
from src.utils.files import METRICS
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


def compare(folders: list[Path]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return two tables of the runs, each with a value for each run by its name.

    The first has the settings that are not the same in all runs: configuration, fingerprints of
    the data, commit and versions. The second has status, steps, losses, speed, memory and what
    scripts/evaluate.py measured.
    """
    settings, results = [], []
    for folder in folders:
        try:
            settings.append(_settings(folder))
            results.append(_result(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            problem = f"a file of this run is damaged: {first_line(error)}"
            raise UserError(f"{folder}: {problem}") from None
    different = {name: row for name, row in _table(settings).items() if len({*row}) > 1}
    return different, _table(results)


def _table(runs: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: [str(run.get(name, "-")) for run in runs] for name in names}


def _settings(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    settings = flatten(config) | read_record(folder)["tags"]
    del settings["output_dir"], settings["command"]  # they differ always
    if (changes := folder / "uncommitted.diff").is_file():
        settings["uncommitted.diff"] = sha256(changes.read_bytes()).hexdigest()[:16]
    return settings


def _result(folder: Path) -> dict[str, str]:
    lines = read_metrics(folder / METRICS)
    result = {
        "status": read_record(folder)["status"],
        "steps": str(lines[-1]["step"] if lines else 0),
    }
    for name, key, summarize in (
        ("loss", "loss", lambda values: values[-1]),
        ("best evaluation", "eval_loss", min),
        ("tokens per second", "tokens_per_second", median),
        ("peak GiB", "peak_memory_gib", max),
    ):
        if values := [line[key] for line in lines if line.get(key) is not None]:
            result[name] = _rounded(summarize(values))
    if lines and lines[-1]["loss"] is None:
        result["loss"] = "not finite"
    if (report := folder / "evaluation.json").is_file():
        measured = json.loads(report.read_text("utf-8"))
        for name, figure in measured["scores"]["model"].items():
            result[f"{name} on {measured['data']}"] = _rounded(figure)
    return result


def _rounded(figure: float) -> str:
    """Four digits, and no exponent for a large number."""
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.4g}"


if __name__ == "__main__":
    run_script(main)
