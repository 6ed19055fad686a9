"""Compare runs: where config, data, code and versions differ, and what each run reached."""

import json
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from src.config import flatten
from src.training.record import read_metrics, read_record
from src.utils.errors import UserError, first_line
from src.utils.files import METRICS


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
