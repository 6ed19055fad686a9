"""Check machine, project, rows and memory before a run costs anything.

Not checked here, as `uv sync --locked`, pre-commit and the tests do it: packages, lock, lint, seeds
and secrets in git. scripts/look.py shows rows that are cut, left out or duplicated.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pynvml
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.dataset import Document, load_documents
from src.data.encoding import stop_token_ids
from src.models.model import load_tokenizer
from src.preflight import check_run
from src.training.fit import check_feasible, may_shard
from src.training.plan import CannotPlan, Plan, cheapest_that_fits, plan_for
from src.training.record import git
from src.utils.device import pick_device, pick_dtype
from src.utils.environment import from_root
from src.utils.errors import UserError, first_line
from src.utils.memory import GIB, gpu_memory

# NVML's bits for lowered clocks: application clocks, hardware, two of heat, the power supply's
# brake. A power cap under load (0x4) is normal.
LOWERED_CLOCKS = 0x2 | 0x8 | 0x20 | 0x40 | 0x80
CHECKED_DOCUMENTS = 200  # whose tokens are looked at


class Finding(NamedTuple):
    """One line of the page."""

    verdict: str  # OK, WARN, or FAIL: the run would stop, or its result be useless
    text: str
    fix: str = ""  # a command, or what to change


def examine(config: Config) -> Iterator[tuple[str, Iterator[Finding]]]:
    """Yield the parts of the page, each with its findings."""
    yield "machine", _with_errors(_check_machine(config))
    yield "project", _check_project()
    yield "data and template", _with_errors(_check_rows(config))
    yield "memory and disk", _with_errors(_check_plan(config))


def _with_errors(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the findings; an error that would stop the run is one too."""
    try:
        yield from findings
    except UserError as error:
        yield from (Finding("FAIL", problem) for problem in error.problems)


def _check_machine(config: Config) -> Iterator[Finding]:
    yield Finding("OK", f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    device = pick_device(config.device)
    dtype = pick_dtype(config.model.dtype, device)
    for index in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        yield from _check_gpu(index)
    yield _check_operations(config, device, dtype)
    check_feasible(config, device, dtype, _gpus_to_share(config))


def _gpus_to_share(config: Config) -> int:
    """Return the number of GPUs that torchrun would divide the model among, if one is too small."""
    shards = config.device != "cpu" and config.training.strategy != "ddp" and may_shard(config)
    return max(torch.cuda.device_count(), 1) if shards else 1


def _check_gpu(index: int) -> Iterator[Finding]:
    """Check a GPU's other users, and what lowers its speed."""
    name = f"GPU {index}, {torch.cuda.get_device_name(index)}"
    free, total = (size / GIB for size in torch.cuda.mem_get_info(index))
    yield Finding("OK", f"{name}: {free:.1f} of {total:.1f} GiB free")
    try:
        pynvml.nvmlInit()
        yield Finding("OK", f"driver {pynvml.nvmlSystemGetDriverVersion()}")
        uuid = torch.cuda.get_device_properties(index).uuid
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pids = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError as error:  # WSL, MIG and containers do not answer everything
        yield Finding("WARN", f"{name}: its other users and its clocks are not known: {error}")
        return
    if others := pids - {os.getpid()}:
        fix = "wait, stop them, or set CUDA_VISIBLE_DEVICES in .env"
        yield Finding("WARN", f"{name} is also used by process {', '.join(map(str, others))}", fix)
    if reasons & LOWERED_CLOCKS:
        yield Finding("WARN", f"{name} runs at lowered clocks", "nvidia-smi -q -d PERFORMANCE")


def _check_operations(config: Config, device: torch.device, dtype: torch.dtype) -> Finding:
    """Run a small matmul with its gradient and, if the config needs it, quantize a weight."""
    quantizes = config.model.quantization != "none"
    tried = f"tried {dtype} matmul on {device.type}" + ", 4-bit quantization" * quantizes
    try:
        factor = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        (factor @ factor).sum().backward()
        if quantizes:
            from bitsandbytes.functional import quantize_4bit

            quantize_4bit(factor.detach())
    except Exception as error:  # noqa: BLE001 - whatever a build for another CUDA raises
        fix = "nvidia-smi shows the GPU's state and driver"
        return Finding("FAIL", f"{tried}: {first_line(error)}", fix)
    return Finding("OK", tried)


def _check_project() -> Iterator[Finding]:
    status = git("status", "--porcelain")
    if status is None:
        fix = "git init && git add -A && git commit -m 'Begin'; or what `git status` says"
        yield Finding("WARN", "`git status` fails: a run cannot record its code", fix)
        return
    text = f"uncommitted files: {len(status.splitlines())}; a run records the tracked ones' diff"
    yield Finding("WARN" if status else "OK", text, "git add -A && git commit")
    if git("log", "--all", "--format=%h", "-1", "--", ".env"):
        yield Finding("WARN", ".env is in `git log --all -- .env`", "revoke its tokens")


def _check_rows(config: Config) -> Iterator[Finding]:
    check_run(config, output=False)
    tokenizer = load_tokenizer(config.model)
    train, evaluation = load_documents(config, tokenizer)
    yield Finding("OK", f"{len(train):,} documents; uv run scripts/look.py describes them")
    yield from _check_tokens(train[list(range(min(CHECKED_DOCUMENTS, len(train))))], tokenizer)
    if evaluation is None:
        yield Finding("WARN", "no rows to evaluate on", "data.eval=0.05 holds out a share")
    elif evaluation is not train and (count := np.isin(evaluation.hashes(), train.hashes()).sum()):
        text = f"{count:,} documents of data.eval are in data.train too"
        yield Finding("WARN", text, "data.eval=0.05 holds out a share of data.train")


def _check_tokens(documents: list[Document], tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that documents do not begin with two BOS tokens, and that they teach a stop token."""
    bos, count = tokenizer.bos_token_id, len(documents)
    starts = [document.input_ids[:2].tolist() for document in documents]
    if bos not in {None, tokenizer.eos_token_id} and [bos, bos] in starts:
        fix = "remove bos_token from model.chat_template, or from the rows"
        yield Finding("FAIL", "documents begin with two BOS tokens", fix)
    stops = {*stop_token_ids(tokenizer)}
    taught = sum(not stops.isdisjoint(document.labels.tolist()) for document in documents)
    verdict = "OK" if taught == count else "WARN" if taught else "FAIL"
    fix = "a larger data.max_length if rows are cut; else end turns in model.chat_template"
    yield Finding(verdict, f"{taught} of {count} documents teach a stop token", fix)


def _check_plan(config: Config) -> Iterator[Finding]:
    """Compare the plan with this GPU, or without one with this machine's memory; then the disk."""
    gpu = gpu_memory() if config.device != "cpu" else {}
    total = gpu["total"] if gpu else psutil.virtual_memory().total / GIB
    try:
        config, planned = plan_for(config, total if gpu else float("inf"))
    except CannotPlan as error:
        yield Finding("WARN", f"no plan: {error}")
        return
    yield _check_memory(config, planned, total)
    yield _check_disk(config, planned)


def _check_memory(config: Config, planned: Plan, total: float) -> Finding:
    peak, gpus, where = planned.peak_gib, _gpus_to_share(config), "here"
    if peak > total and gpus > 1:
        peak -= (planned.weights + planned.gradients + planned.moments) * (1 - 1 / gpus)
        where = f"on each GPU, with torchrun --nproc-per-node={gpus}"
    text = f"a step needs {peak:.2f} of {total:.1f} GiB {where}"
    if peak <= total:
        return Finding("OK", text)
    change = cheapest_that_fits(config, total)
    fix = f"{change[0]}: {change[1]:.1f} GiB" if change else "a larger GPU or a smaller model"
    return Finding("FAIL", text, fix)


def _check_disk(config: Config, planned: Plan) -> Finding:
    """Compare the disk's room with the kept checkpoints, the one being written, and the result."""
    settings, folder = config.training, from_root(config.output_dir)
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    count = 1 if settings.save_every is None else settings.keep_checkpoints + 2
    # What is trained is as large as its gradients.
    needed = count * (planned.gradients + planned.moments) + planned.gradients
    text = f"{count} checkpoints and the result need {needed:.2f} GiB; {free:.1f} are free"
    verdict = "OK" if free > needed else "FAIL"
    return Finding(verdict, f"{text} in {folder}", "make room there, or choose another output_dir")
