"""Does the run fit, as planned; and what would make it fit."""

from collections.abc import Iterator

import psutil
import torch

from src.config import Config
from src.doctor import Finding
from src.training.plan import Plan, cheapest_that_fits
from src.training.strategy import may_shard
from src.utils.memory import GIB, gpu_memory


def check_memory(config: Config, planned: Plan | None, why_not: str) -> Iterator[Finding]:
    """The plan's peak against this GPU, or without one against this machine's memory."""
    if planned is None:
        yield Finding("WARN", f"no plan: {why_not}")
        return
    gpu = gpu_memory() if config.device != "cpu" else {}
    room = gpu.get("total") or psutil.virtual_memory().total / GIB
    where, gpus = "GPU" if gpu else "machine", sharing_gpus(config) if gpu else 1
    peak = planned.peak_gib if gpu else planned.peak_gib - planned.overhead
    held = planned.weights + planned.gradients + planned.moments
    shared = ""
    if peak > room and gpus > 1:
        peak -= held * (1 - 1 / gpus)
        shared = f" by torchrun --nproc-per-node={gpus}, with a shard for each of them"
    text = f"{peak:.2f} GiB at the peak, of {room:.1f} on this {where}{shared}: "
    text += f"weights {planned.weights:.2f}, gradients {planned.gradients:.2f}, moments "
    text += f"{planned.moments:.2f}, activations {planned.activations:.2f}"
    if peak > room:
        change = cheapest_that_fits(config, room)
        mend = f"{change[0]}: {change[1]:.1f} GiB" if change else "a larger GPU, or a smaller model"
        yield Finding("FAIL", text, mend)
        return
    yield Finding("OK", text)
    # The context that the overhead is for is there already: this very process has one.
    if gpu and peak - planned.overhead > gpu["free"]:
        text = f"only {gpu['free']:.1f} GiB of this GPU are free now"
        yield Finding("WARN", text, "nvidia-smi shows who holds the rest")


def sharing_gpus(config: Config) -> int:
    """Among how many GPUs of this machine torchrun would divide the model, if one is too small."""
    wanted = config.training.strategy
    shared = wanted in {"fsdp", "hsdp"} or (wanted == "auto" and may_shard(config))
    return torch.cuda.device_count() if shared else 1
