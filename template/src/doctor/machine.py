"""Can this machine run the config: environment, GPU, the operations, room on the disk."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pynvml
import torch

from src.config import Config
from src.doctor import Finding
from src.doctor.memory import sharing_gpus
from src.training.feasibility import check_feasible
from src.training.plan import Plan
from src.utils.device import nvidia_driver, pick_device, pick_dtype
from src.utils.environment import from_root
from src.utils.errors import UserError
from src.utils.memory import GIB
from src.utils.seed import set_seed

# Why a GPU does not run at its full clocks, by NVML's bits; a power cap under load is normal.
SLOWED = {
    0x2: "its application clocks are set",
    0x8: "the hardware slows it",
    0x20: "it is hot",
    0x40: "it is too hot",
    0x80: "its power supply slows it",
}


def check_machine(config: Config, planned: Plan | None) -> Iterator[Finding]:
    """Look at this machine; without a plan, what the plan would tell is left out."""
    yield from _environment()
    try:
        device = pick_device(config.device)
        dtype = pick_dtype(config.model.dtype, device)
        if planned is not None:
            check_feasible(config, device, dtype, max(1, sharing_gpus(config)))
    except UserError as error:
        yield from (Finding("FAIL", problem) for problem in error.problems)
        return
    if device.type == "cpu":
        known = "and this config needs none" if planned else "and this model may need one"
        yield Finding("OK" if planned else "WARN", f"no GPU here, {known}")
    for index in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        yield from _gpu(index)
    yield from _operations(config, device, dtype)
    if planned is not None:
        yield from _disk(config, planned)


def _environment() -> Iterator[Finding]:
    found = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "transformers", "peft", "bitsandbytes", "mlflow"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding("FAIL", f"{name} is not installed", "uv sync --locked")
    yield Finding("OK", ", ".join(found))


def _gpu(index: int) -> Iterator[Finding]:
    """A GPU that torch sees, who else uses it, and what slows it."""
    name = f"GPU {index}, {torch.cuda.get_device_name(index)}"
    free, total = (size / GIB for size in torch.cuda.mem_get_info(index))
    built = f"driver {nvidia_driver()}, torch built for CUDA {torch.version.cuda}"
    yield Finding("OK", f"{name}: {free:.1f} of {total:.1f} GiB free; {built}")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("WARN", f"{name} has no bf16: training uses fp16 with a loss scaler")
    try:
        yield from _use(index, name)
    except pynvml.NVMLError as error:  # WSL, MIG and containers let some questions open
        yield Finding("WARN", f"{name}: who uses it, and how fast it may run: {error}")


def _use(index: int, name: str) -> Iterator[Finding]:
    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if process.pid != os.getpid():
            held = (process.usedGpuMemory or 0) / GIB
            mend = f"wait, or kill {process.pid}, or CUDA_VISIBLE_DEVICES=… in .env"
            yield Finding("WARN", f"process {process.pid} holds {held:.1f} GiB of {name}", mend)
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    for bit, why in SLOWED.items():
        if reasons & bit:
            yield Finding("WARN", f"{name} is slow: {why}", "nvidia-smi -q -d PERFORMANCE,CLOCK")
    limit = pynvml.nvmlDeviceGetPowerManagementLimit(handle) // 1000
    usual = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) // 1000
    if limit < usual:
        mend = f"sudo nvidia-smi -i {index} -pl {usual}"
        yield Finding("WARN", f"{name} may draw {limit} W of its usual {usual}", mend)


def _operations(config: Config, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """The operations that training needs, tiny and real, and from the same seed the same."""
    name = str(dtype).removeprefix("torch.")
    try:
        first, second = (_product(config.seed, device, dtype) for _ in range(2))
    except RuntimeError as error:
        text = f"{name} on {device.type}: {str(error).splitlines()[0]}"
        yield Finding("FAIL", text, "nvidia-smi shows what is wrong with the GPU")
        return
    if torch.equal(first, second):
        yield Finding("OK", f"{name} multiplies and differentiates; seed={config.seed} repeats it")
    else:
        yield Finding("FAIL", f"seed={config.seed} does not repeat a product", "deterministic=true")
    if config.model.quantization != "none" or device.type == "cuda":
        yield from _four_bits(config, device)


def _product(seed: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    set_seed(seed)
    factor = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
    (factor @ factor).square().mean().backward()
    assert factor.grad is not None
    return factor.grad


def _four_bits(config: Config, device: torch.device) -> Iterator[Finding]:
    needed = config.model.quantization != "none"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = torch.randn(64, 64, device=device)
        off = (dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).abs().mean()
        problem = "" if off < 0.1 else f"4 bits are off by {off:.2f}"
    except Exception as error:  # noqa: BLE001 - whatever a build for another CUDA raises
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if problem:
        mend = "model.quantization=none, or a bitsandbytes for this CUDA"
        yield Finding("FAIL" if needed else "WARN", f"bitsandbytes does not work: {problem}", mend)
    else:
        yield Finding("OK", f"bitsandbytes keeps weights in 4 bits on {device.type}")


def _disk(config: Config, planned: Plan) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, one that is being written, and the result."""
    settings, folder = config.training, from_root(config.output_dir)
    count = 1 if settings.save_every is None else settings.keep_checkpoints + 2
    each = planned.gradients + planned.moments  # what is trained is as large as its gradients
    needed = count * each + planned.gradients
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.1f} GiB free for {count} checkpoints of {each:.2f} GiB and the result"
    mend = f"make room on the disk of {Path(folder)}, or another output_dir=…"
    yield Finding("OK", text) if free > needed else Finding("FAIL", text, mend)
