"""Files of JSON lines, such as `metrics.jsonl`, and the curves drawn of them; without torch."""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from src.utils.files import METRICS, write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a file of JSON lines; a crash may have cut the last one."""
    lines = []
    # Not splitlines(): an answer may have a separator that ends a line for Python, not for JSON.
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            read = json.loads(line)
            lines += [read] * isinstance(read["step"], int)
    return lines


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run takes those steps again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    if path.exists():
        write_text(path, text)


def draw_curves(folders: Sequence[Path], picture: Path) -> None:
    """Draw the training and evaluation loss of one run or several over their steps."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    canvas = Figure(figsize=(8, 4.5), layout="constrained")
    axes = canvas.subplots()
    for number, folder in enumerate(folders):
        rows = read_metrics(folder / METRICS)
        evaluated = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        points = {"training": even_losses(rows), "evaluation": evaluated}  # null leaves a gap
        for (name, drawn), style in zip(points.items(), ("-", "o--"), strict=True):
            if drawn:
                label = f"{folder.name}: {name}"
                axes.plot(*zip(*drawn, strict=True), style, label=label, color=f"C{number}")
    axes.set(xlabel="optimizer step", ylabel="loss per labelled token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    canvas.savefig(picture, dpi=120, format="png")


def even_losses(rows: list[dict[str, Any]]) -> list[tuple[int, float | None]]:
    """Return steps and training losses, each a mean over about equally many steps.

    A line that was written at a save, a stop or an evaluation may cover one step only, whose loss
    would stand out; it is averaged with the lines after it.
    """
    steps = [0, *(row["step"] for row in rows)]
    counts = [after - before for before, after in pairwise(steps)]
    usual = median(counts or [0])
    points, total, covered = [], 0.0, 0
    for row, count in zip(rows, counts, strict=True):
        total, covered = total + (row["loss"] or 0) * count, covered + count
        if row["loss"] is None or covered >= usual:
            points.append((row["step"], row["loss"] and total / covered))
            total, covered = 0.0, 0
    return points
