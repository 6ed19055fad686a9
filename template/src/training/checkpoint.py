"""Checkpoints that are whole or absent, checked when read, and never the last one deleted."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from src.utils.errors import RunError, UserError
from src.utils.files import new_folder

MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """Where a run stands: the plain numbers of a checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch that `position` is in
    position: int = 0  # microbatches of this epoch done, on each rank
    tokens: int = 0  # real tokens seen, filler not counted
    skipped: int = 0  # steps not taken, for want of labels or of finite numbers
    best_loss: float = float("inf")
    best_step: int | None = None
    evaluations_without_gain: int = 0
    tracking_run: str | None = None  # MLflow's id, so that a resumed run continues it


@dataclass
class Training:
    """Everything that changes while training, which is exactly what a checkpoint holds."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    state: TrainState


def save_checkpoint(training: Training, folder: Path, identity: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N`, then prune: the newest `keep` stay, and the best one.

    Args:
        training: what to save; of the model only the weights that train.
        folder: the run's `checkpoints` folder.
        identity: what a resumed run must share with this one, see `check_identity`.
        keep: how many of the newest to keep, at least 1.

    Raises:
        RunError: it could not be written, e.g. to a full disk; those before are untouched.
    """
    path = folder / f"step-{training.state.step:08d}"
    if path.exists():  # saved by the loop, and now again by a signal
        return path
    try:
        _write_checkpoint(training, path, identity)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save on a full disk says "unexpected pos 704 vs 598": say what is the matter.
        free = shutil.disk_usage(folder).free / 2**30
        needed = _size(training) / 2**30
        why = (
            f"the disk is full: it takes about {needed:.2f} GiB and {free:.2f} are free"
            if free < needed
            else str(error).splitlines()[0]
        )
        newest, _ = newest_checkpoint(folder)
        left = f"{newest.name} before it is whole" if newest else "there is none before it"
        raise RunError(f"{path}: this checkpoint could not be written: {why}; {left}") from error
    prune(folder, keep, training.state.best_step)
    return path


def _write_checkpoint(training: Training, path: Path, identity: dict[str, Any]) -> None:
    with new_folder(path) as temporary:
        # contiguous().clone(): safetensors refuses views and shared storage.
        weights = {k: v.detach().contiguous() for k, v in _trained(training.model).items()}
        save_file(weights, temporary / "weights.safetensors")
        torch.save(
            {
                "optimizer": training.optimizer.state_dict(),
                "scheduler": training.scheduler.state_dict(),
                "scaler": training.scaler.state_dict(),
                "random": _random_state(),
            },
            temporary / "state.pt",
        )
        record = {"state": asdict(training.state), "identity": identity}
        (temporary / "run.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        _write_manifest(temporary)


def load_checkpoint(training: Training, path: Path, device: torch.device) -> None:
    """Put everything back as `save_checkpoint` found it, the random generators included."""
    weights = load_file(path / "weights.safetensors", device=str(device))
    trained = _trained(training.model)
    if weights.keys() != trained.keys():
        raise UserError(f"{path}: its weights are not those of this model")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    # weights_only: a checkpoint is data and must not be able to run code.
    saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    groups, scheduler = training.optimizer.param_groups, training.scheduler
    configured = [{k: group[k] for k in ("initial_lr", "weight_decay")} for group in groups]
    training.optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    # The learning rate and decay of today's config count, at the place of the schedule where
    # the run stopped; else a changed one would be printed, recorded and ignored.
    scheduler.base_lrs = [values["initial_lr"] for values in configured]
    for group, values, factor in zip(
        training.optimizer.param_groups, configured, scheduler.lr_lambdas, strict=True
    ):
        group.update(values, lr=values["initial_lr"] * factor(scheduler.last_epoch))
    training.scaler.load_state_dict(saved["scaler"])
    known = {field.name for field in fields(TrainState)}
    state = read_record(path)["state"]
    training.state.__dict__.update({k: v for k, v in state.items() if k in known})
    _set_random_state(saved["random"])


def read_record(path: Path) -> dict[str, Any]:
    """The plain part of a checkpoint: `state` and `identity`."""
    return json.loads((path / "run.json").read_text(encoding="utf-8"))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a warning for each damaged one that was passed over."""
    warnings = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path, warnings
        warnings.append(f"{path}: {damage}; skipped")
    return None, warnings


def find_damage(path: Path) -> str | None:
    """What differs from the manifest: a missing, truncated or altered file; None if whole.

    Checksums, because one flipped bit loads silently in safetensors' and torch's formats.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable manifest"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} is not what was written (checksum)"
    return None


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Refuse to continue a run with another model, other data or another batch geometry.

    Raises:
        UserError: naming each difference.
    """
    saved = read_record(path)["identity"]
    differences = [
        f"training.resume: {key} was {saved.get(key)} in {path.name} and is {identity[key]} now; "
        "put it back, start in another output_dir, or set training.allow_mismatch=true"
        for key in identity
        if saved.get(key) != identity[key]
    ]
    if differences:
        raise UserError(*differences)


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete old checkpoints, but not the best one, and nothing before a newer one is whole."""
    paths = sorted(folder.glob("step-*"), reverse=True)
    for path in paths[keep:]:
        if best_step is not None and path.name == f"step-{best_step:08d}":
            continue
        # Renamed first: a crash in the middle of the deletion leaves no half checkpoint.
        doomed = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    for leftover in folder.glob(".step-*.tmp"):  # these, and what a kill left half-written
        shutil.rmtree(leftover, ignore_errors=True)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _size(training: Training) -> int:
    """Bytes of the weights that train and of the optimizer's state."""
    state = [v for s in training.optimizer.state.values() for v in s.values()]
    tensors = [t for t in state if isinstance(t, torch.Tensor)]
    return sum(t.nbytes for t in [*_trained(training.model).values(), *tensors])


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_state() -> dict[str, Any]:
    # As lists and tensors, which weights_only loading accepts; numpy's own arrays it does not.
    version, keys, gauss = random.getstate()
    name, numpy_keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(keys), gauss],
        "numpy": [name, torch.from_numpy(numpy_keys.copy()), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(saved: dict[str, Any]) -> None:
    version, keys, gauss = saved["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, *rest = saved["numpy"]
    np.random.set_state((name, numpy_keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
