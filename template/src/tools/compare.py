"""Compare runs: where config, data, code and versions differ, and what each run reached."""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from statistics import median

import yaml

from src.config import flatten
from src.training.report import read_metrics
from src.utils.files import RECORD

IGNORED_TAGS = {"command", "config"}  # they differ always, or repeat what the config says


def compare(folders: list[Path]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return two tables of the runs, each with a value for each run by its name.

    The first has the settings that are not the same in all runs: configuration, fingerprints of
    the data, commit and versions. The second has status, steps, losses, speed and memory.
    """
    settings = _by_name(map(_settings, folders))
    different = {name: values for name, values in settings.items() if len(set(values)) > 1}
    return different, _by_name(map(_result, folders))


def _by_name(columns: Iterable[dict[str, str]]) -> dict[str, list[str]]:
    runs = list(columns)
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: [run.get(name, "-") for run in runs] for name in names}


def _settings(folder: Path) -> dict[str, str]:
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    del config["output_dir"]
    tags = json.loads((folder / RECORD).read_text("utf-8"))["tags"]
    settings = flatten(config) | {k: v for k, v in tags.items() if k not in IGNORED_TAGS}
    if (changes := folder / "uncommitted.diff").is_file():
        settings["uncommitted.diff"] = sha256(changes.read_bytes()).hexdigest()[:16]
    return {name: str(value) for name, value in settings.items()}


def _result(folder: Path) -> dict[str, str]:
    status = json.loads((folder / RECORD).read_text("utf-8"))["status"]
    lines = read_metrics(folder / "metrics.jsonl")
    result = {"status": status, "steps": str(lines[-1]["step"] if lines else 0)}
    for name, key, summarize in (
        ("loss", "loss", lambda values: values[-1]),
        ("best evaluation", "eval_loss", min),
        ("tokens per second", "tokens_per_second", median),
        ("peak GiB", "peak_memory_gib", max),
    ):
        if values := [line[key] for line in lines if line.get(key) is not None]:
            result[name] = f"{summarize(values):,.4g}"
    if lines and lines[-1]["loss"] is None:
        result["loss"] = "not finite"
    return result
