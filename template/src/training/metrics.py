"""Files of JSON lines, such as `metrics.jsonl`, and the curves drawn of them; without torch."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.utils.files import METRICS, write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a file of JSON lines; a crash may have cut the last one."""
    lines = []
    # Not splitlines(): an answer may have a separator that ends a line for Python, not for JSON.
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            read = json.loads(line)
            if isinstance(read["step"], int):
                lines.append(read)
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
        for key, style in (("loss", "-"), ("eval_loss", "o--")):
            drawn = [(row["step"], row[key]) for row in rows if key in row]  # null leaves a gap
            if drawn:
                label = f"{folder.name}: {key}"
                axes.plot(*zip(*drawn, strict=True), style, label=label, color=f"C{number}")
    axes.set(xlabel="optimizer step", ylabel="loss per labelled token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    canvas.savefig(picture, dpi=120, format="png")
