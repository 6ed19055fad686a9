"""What makes runs differ: config, data, code and versions; and what came out of each."""

import json
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from src.config import flatten
from src.training.report import read_metrics

# Tags that differ between any two runs, or say again what the config says.
UNTOLD = {"command", "config", "run_key"}


def differences(folders: list[Path]) -> dict[str, list[Any]]:
    """What is not the same in all of these runs: by name, a value for each of them."""
    return {k: row for k, row in _table(map(_facts, folders)).items() if len(set(row)) > 1}


def results(folders: list[Path]) -> dict[str, list[Any]]:
    """What came out of each of these runs, by name."""
    return _table(map(_result, folders))


def _table(rows: Any) -> dict[str, list[Any]]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, "-") for row in rows] for name in names}


def _facts(folder: Path) -> dict[str, str]:
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    config.pop("output_dir")
    record = json.loads((folder / "record.json").read_text("utf-8"))
    facts = flatten(config) | {k: v for k, v in record["tags"].items() if k not in UNTOLD}
    if (changes := folder / "uncommitted.diff").is_file():
        facts["uncommitted.diff"] = sha256(changes.read_bytes()).hexdigest()[:16]
    return {name: str(value) for name, value in facts.items()}


def _result(folder: Path) -> dict[str, Any]:
    status = json.loads((folder / "record.json").read_text("utf-8"))["status"]
    log = read_metrics(folder / "metrics.jsonl")
    last = log[-1] if log else {}
    found: dict[str, Any] = {"status": status, "steps": last.get("step", 0)}
    for name, key, pick in (
        ("loss", "loss", lambda values: values[-1]),
        ("best evaluation", "eval_loss", min),
        ("tokens a second", "tokens_per_second", median),
        ("peak GiB", "peak_memory_gib", max),
    ):
        if values := [line[key] for line in log if line.get(key) is not None]:
            found[name] = f"{pick(values):,.4g}"
    return found
