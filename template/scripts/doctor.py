"""Say what this machine can do for training: `uv run scripts/doctor.py`, OK, WARN or FAIL a line.

Exit code 1 if something FAILs. Paste its output when you ask somebody for help.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from src.utils.environment import PROJECT_ROOT, load_environment
from src.utils.errors import UserError, run_script

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "omegaconf", "mlflow")
Finding = tuple[str, str]  # (OK | WARN | FAIL, what and what to do)


def main(arguments: list[str]) -> None:
    """Print every finding; none of them changes anything."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return
    if arguments:
        raise UserError(f"doctor takes no arguments, not {' '.join(arguments)}")
    load_environment()
    failed = False
    for verdict, text in (*_software(), *_disk(), *_secrets(), *_gpu()):
        print(f"{verdict:<4} {text}")
        failed |= verdict == "FAIL"
    sys.exit(1 if failed else 0)


def _software() -> Iterator[Finding]:
    yield "OK", f"python {platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            yield "OK", f"{name} {version(name)}"
        except PackageNotFoundError:
            yield "FAIL", f"{name} is not installed: uv sync --locked"


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(PROJECT_ROOT).free / 2**30
    # An 8B model's weights in bf16 are 15 GiB, and a checkpoint needs room beside the last one.
    text = f"{free:.0f} GiB free on the project's disk"
    yield ("OK", text) if free > 40 else ("WARN", f"{text}; an 8B model and its runs take 40")


def _secrets() -> Iterator[Finding]:
    if not (PROJECT_ROOT / ".env").is_file():
        yield "WARN", "no .env: cp .env.example .env (only gated models and settings need it)"
    gated = "HF_TOKEN is not set: gated models such as Llama cannot be fetched"
    yield ("OK", "HF_TOKEN is set") if os.environ.get("HF_TOKEN") else ("WARN", gated)


def _gpu() -> Iterator[Finding]:
    import torch

    from src.utils.device import unusable_gpu

    if not torch.cuda.is_available():
        unusable = unusable_gpu()
        yield ("FAIL", unusable) if unusable else ("WARN", "no GPU: only tiny models train here")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
        free, total = (value / 2**30 for value in torch.cuda.mem_get_info(index))
        yield "OK", f"{name}, {free:.1f} of {total:.1f} GiB free"
        if free < 0.9 * total:
            yield "WARN", f"{name} is in use by another process: see nvidia-smi"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield "WARN", f"{name} has no bf16: training uses fp16 with a loss scaler"


if __name__ == "__main__":
    run_script(main)
