"""What a run writes down: `metrics.jsonl` first, then the terminal, MLflow and `loss.png`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.training.tracking import Tracker
from src.utils.files import write_text


class Recorder:
    """Appends one JSON object per log line; the rest is shown or sent from that."""

    def __init__(self, folder: Path, tracker: Tracker | None, total_steps: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.tracker = tracker
        self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, disable=None)
        self.total_steps = total_steps

    def log(self, metrics: dict[str, Any]) -> None:
        """Write one line everywhere; keys as in `metrics.jsonl`."""
        with self.path.open("a", encoding="utf-8") as file:
            # allow_nan=False would raise; a NaN is not JSON, so it is written as null.
            clean = {k: None if _is_nan(v) else v for k, v in metrics.items()}
            file.write(json.dumps(clean) + "\n")
        self.say(self._line(metrics))
        if self.tracker:
            self.tracker.log(metrics, step=metrics["step"])

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        self.bar.write(text)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.update(step - self.bar.n)

    def close(self, status: str) -> None:
        """Put the bar away and tell the tracker: FINISHED, FAILED or KILLED."""
        self.bar.close()
        if self.tracker:
            self.tracker.close(status)

    def _line(self, m: dict[str, Any]) -> str:
        parts = [
            f"step {m['step']:>{len(str(self.total_steps))}}/{self.total_steps}",
            f"epoch {m['epoch']:.2f}",
            f"loss {m['loss']:.4f}",
            f"lr {m['learning_rate']:.2e}",
            f"grad {m['grad_norm']:.2f}",
            f"{m['tokens_per_second']:,.0f} tok/s",
        ]
        if "mfu" in m:
            parts.append(f"mfu {m['mfu']:.0%}")
        if "peak_memory_gib" in m:
            parts.append(f"{m['peak_memory_gib']:.1f} GiB")
        if "eval_loss" in m:
            parts.append(f"eval loss {m['eval_loss']:.4f}, perplexity {m['perplexity']:.2f}")
        return " · ".join(parts)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`; a crash may have cut the last one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run takes those steps again."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training and evaluation loss over steps as a PNG."""
    import matplotlib

    matplotlib.use("agg")  # no display
    from matplotlib import pyplot as plt

    rows = [row for row in read_metrics(metrics) if row["loss"] is not None]
    evaluated = [row for row in rows if row.get("eval_loss") is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label="training")
    if evaluated:
        steps, losses = zip(*((r["step"], r["eval_loss"]) for r in evaluated), strict=True)
        axes.plot(steps, losses, "o-", label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss per labelled token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(picture)
    plt.close(figure)
