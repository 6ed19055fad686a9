"""Does the run fit, as planned; and what would make it fit."""

from collections.abc import Iterator

import psutil

from src.config import Config
from src.doctor import Finding
from src.training.plan import Plan, cheapest_that_fits
from src.utils.memory import GIB, gpu_memory


def check_memory(config: Config, planned: Plan | None, why_not: str) -> Iterator[Finding]:
    """The plan's peak against this GPU, or without one against this machine's memory."""
    if planned is None:
        yield Finding("WARN", f"no plan: {why_not}")
        return
    total = gpu_memory().get("total") if config.device != "cpu" else None
    room = total or psutil.virtual_memory().total / GIB
    where = "GPU" if total else "machine"
    peak = planned.peak_gib if total else planned.peak_gib - planned.overhead
    text = f"{peak:.2f} GiB at the peak, of {room:.1f} on this {where}: "
    text += f"weights {planned.weights:.2f}, gradients {planned.gradients:.2f}, moments "
    text += f"{planned.moments:.2f}, activations {planned.activations:.2f}"
    if peak <= room:
        yield Finding("OK", text)
        return
    change = cheapest_that_fits(config, room)
    mend = f"{change[0]}: {change[1]:.1f} GiB" if change else "a larger GPU, or a smaller model"
    yield Finding("FAIL", text, mend)
