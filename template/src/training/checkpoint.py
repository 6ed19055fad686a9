"""Checkpoints: weights, moments, position; whole or absent, checked when read.

A checkpoint has the same files whatever number of processes and strategy wrote it:

    weights/*.safetensors    the weights that train, as torch's distributed checkpoints
    moments/*.safetensors    what the optimizer keeps for them
    run.json                 position, and what a resumed run must share
    manifest.json            a checksum of each of these files
"""

import hashlib
import json
import math
import shutil
import warnings
from collections import ChainMap
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config, TrainingConfig, flatten
from src.data.batching import TokenLoader
from src.data.dataset import Facts
from src.models.adapters import base_of
from src.training.speed import Speed
from src.utils.distributed import RANK, WORLD_SIZE, gather, is_main, on_main
from src.utils.environment import from_root
from src.utils.errors import UserError
from src.utils.files import CHECKPOINT, STEPS, new_folder

# DCP warns that it assumes one process, even if no_dist says so.
warnings.filterwarnings("ignore", "torch.distributed is disabled")
MANIFEST = "manifest.json"
WEIGHTS, MOMENTS = "weights", "moments"  # folders
TENSORS_A_FILE = 50  # DCP builds each file in the host's memory
# Keys that must not change when a run is resumed.
IDENTITY = (
    *("seed", "model.name", "model.quantization", "lora", "data.max_length", "data.packing"),
    *("training.batch_size", "training.optimizer"),
)


@dataclass
class TrainState:
    """Where a run stands: the plain numbers of a checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch that `position` is in
    position: int = 0  # microbatches of this epoch done, over all processes
    tokens: int = 0  # real tokens seen, filler not counted
    skipped: int = 0  # steps not taken: no labels, or not finite
    learning_rate: float | None = None  # of the next step; None: not known
    best_loss: float = math.inf
    best_step: int | None = None

    def is_due(self, every: int | None) -> bool:
        """Whether this step is a multiple of `every`; null: never."""
        return every is not None and self.step % every == 0

    def record_evaluation(self, loss: float) -> bool:
        """Remember an evaluation; return whether it is better than all before."""
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
        return self.best_step == self.step

    def is_out_of_patience(self, settings: TrainingConfig) -> bool:
        """Whether `training.patience` evaluations in a row were no better than the best one."""
        if settings.patience is None or settings.eval_every is None or self.best_step is None:
            return False
        return self.step - self.best_step >= settings.patience * settings.eval_every


@dataclass
class Training:
    """What a checkpoint saves and restores."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    identity: dict[str, Any]  # what a resumed run must share with this one: see `identify`
    state: TrainState = field(default_factory=TrainState)

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state of the trained weights, by `weight/state`."""
        moments = {}
        for weight_name, weight in trained_weights(self.model).items():
            for key, kept in self.optimizer.state.get(weight, {}).items():
                name = f"{weight_name}/{key}"
                # An 8-bit moment is one tensor to the optimizer, and several in a file.
                parts = getattr(kept, "tensor_attrs", ())
                moments |= {f"{name}/{part}": getattr(kept, part) for part in parts} or {name: kept}
        return moments


@dataclass(kw_only=True)
class Run(Training):
    """What a run holds from its first step to its result, beside what its checkpoints save."""

    config: Config
    tokenizer: Tokenizer
    objective: nn.Module  # the model with its loss, wrapped for DDP or FSDP
    dtype: torch.dtype  # of matmuls
    train_loader: TokenLoader
    eval_loader: TokenLoader | None
    speed: Speed
    total_steps: int  # of the whole run, those before a checkpoint included

    @property
    def folder(self) -> Path:
        """Where all that it leaves is written."""
        return from_root(self.config.output_dir)


def trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def identify(config: Config, data: Facts) -> dict[str, Any]:
    """What a resumed run must share: IDENTITY, the data and the batches of a step."""
    same = {k: v for k, v in flatten(config.model_dump()).items() if k.startswith(IDENTITY)}
    return same | {
        "lora=null": config.lora is None,
        "data.train": f"{config.data.train} ({data.fingerprint[:12]})",
        # So 2 processes that accumulate 4 go on where 8 processes accumulated none.
        "gradient_accumulation_steps x processes":
            config.training.gradient_accumulation_steps * WORLD_SIZE,
    }  # fmt: skip


def save_checkpoint(training: Training, folder: Path, keep: int) -> Path:
    """Write `folder/step-N`, then prune: the newest `keep` stay, and the best one.

    All processes call it: each writes its own shards.
    """
    path = folder / f"step-{training.state.step:08d}"
    training.state.learning_rate = float(training.optimizer.param_groups[0]["lr"])
    with new_folder(path) if is_main() else nullcontext(path.with_name(f".{path.name}.tmp")) as new:
        _write(training, new)
    on_main(prune, folder, keep, training.state.best_step)
    return path


def _write(training: Training, folder: Path) -> None:
    """Write all from the main process, except shards: each process writes its own."""
    gather(None)  # the folder is made
    # Of the optimizer its moments alone: learning rate and decay are configuration, and the rate
    # follows from the step. Saved, they would overrule the configuration of a resumed run.
    parts = {WEIGHTS: trained_weights(training.model), MOMENTS: training.moments()}
    sharded = _is_sharded(parts[WEIGHTS])
    for part, tensors in parts.items():
        files = {name: 1 + number // TENSORS_A_FILE for number, name in enumerate(tensors)}
        writer = HuggingFaceStorageWriter(str(folder / part), files, save_distributed=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        if sharded or is_main():
            dcp.save(tensors, storage_writer=writer, no_dist=not sharded)
    # Each process hashes its own files: one process would take long to hash all.
    mine = list(folder.rglob(f"shard-{RANK + 1:05}-*"))
    record = {
        "architecture": type(base_of(training.model)).__name__,
        "state": asdict(training.state),
        "identity": training.identity,
        "scaler": training.scaler.state_dict(),
    }
    if is_main():
        mine.append(folder / CHECKPOINT)
        mine[-1].write_text(json.dumps(record), encoding="utf-8")
    checksums = gather({str(file.relative_to(folder)): _sha256(file) for file in mine})
    if is_main():
        manifest = json.dumps(dict(ChainMap(*checksums)), indent=2)
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Copy the weights of a checkpoint into the model, whatever strategy saved it.

    Raises:
        UserError: it is of another architecture, or has other weights.
    """
    if (saved := _record(path)["architecture"]) != type(base_of(model)).__name__:
        raise UserError(f"{path}: was made for another model, a {saved}")
    _load(path / WEIGHTS, trained_weights(model))


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read a folder of shards into these tensors, which must be all that it holds."""
    if _sizes(folder) != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError(f"{folder}: has weights of other names or shapes than this run's")
    reader = HuggingFaceStorageReader(str(folder))
    dcp.load(tensors, storage_reader=reader, no_dist=not _is_sharded(tensors))


def _is_sharded(tensors: dict[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _sizes(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the whole tensors that a folder of shards holds."""
    saved: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in saved.items()}


def load_checkpoint(training: Training, path: Path) -> None:
    """Put everything back in place as `save_checkpoint` found it.

    It may have been saved by more or fewer processes, and with another strategy.
    """
    record, saved = _record(path), _sizes(path / MOMENTS)
    # A step creates the moments in the optimizer's format; loading overwrites what it changed.
    for name, weight in trained_weights(training.model).items():
        if f"{name}/step" in saved:  # else it never had a gradient
            weight.grad = torch.zeros_like(weight)
    with torch.compiler.set_stance("force_eager"):
        training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    load_weights(training.model, path)
    _load(path / MOMENTS, training.moments())
    if record["scaler"]:  # empty if it was not saved in fp16: the new scaler stays
        training.scaler.load_state_dict(record["scaler"])
    vars(training.state).update(record["state"])


def resume(run: Run) -> Path | None:
    """Load the checkpoint that `training.resume` names, if any, and return it.

    Raises:
        UserError: it is damaged; or it is of another run, with a line for each difference.
    """
    settings, checkpoints = run.config.training, run.folder / "checkpoints"
    path = on_main(find_checkpoint, settings.resume, checkpoints)
    if path is not None:
        saved = _record(path)["identity"]
        undo = (
            "undo it, start in another output_dir, or, where weights keep their shapes, set "
            "training.resume_despite_changes=true"
        )
        differences = [
            f"training.resume: {key} was {saved[key]} in {path.name} and is {value} now; {undo}"
            for key, value in run.identity.items()
            if saved.get(key, value) != value  # a later version of the project may have more keys
        ]
        if differences and not settings.resume_despite_changes:
            raise UserError(*differences)
        load_checkpoint(run, path)
        if path.parent.resolve() != checkpoints.resolve():  # the best weights so far are not here
            run.state.best_loss, run.state.best_step = math.inf, None
    return path


def find_checkpoint(resume: str, checkpoints: Path) -> Path | None:
    """The checkpoint that `training.resume` means; None: start anew.

    Prints a warning for each damaged one that is passed over.

    Raises:
        UserError: none is whole.
    """
    if resume == "never":
        return None
    named = checkpoints if resume == "auto" else from_root(resume)
    paths = [*named.glob(STEPS), *named.glob(f"checkpoints/{STEPS}")]
    if resume == "auto" and not paths:
        return None
    for path in sorted(paths, reverse=True) or [named]:
        if (damage := find_damage(path)) is None:
            return path
        print(f"warning: {path}: {damage}")
    anew = "training.resume=never with another output_dir starts anew"
    raise UserError(f"training.resume: {named} has no whole checkpoint; {anew}")


def find_damage(path: Path, skip_folder: str = "") -> str | None:
    """What differs from the manifest: a missing, truncated or altered file; None if whole.

    `skip_folder` is not checked.

    Checksums, because one flipped bit loads silently in safetensors' and torch's formats.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest[CHECKPOINT]
    except (OSError, ValueError, KeyError, TypeError):
        return "no readable manifest"
    for name, checksum in manifest.items():
        if Path(name).parts[0] == skip_folder:
            continue
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != checksum:
            return f"{name} is not what was written (checksum)"
    return None


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` and the best; call it once a newer one is whole."""
    for path in sorted(folder.glob(STEPS), reverse=True)[keep:]:
        if path.name != f"step-{best_step or -1:08d}":
            shutil.rmtree(path, ignore_errors=True)  # a crash here leaves one that is damaged
    for leftover in folder.glob(".step-*.tmp"):  # what a kill left half-written
        shutil.rmtree(leftover, ignore_errors=True)


def _record(path: Path) -> dict[str, Any]:
    return json.loads((path / CHECKPOINT).read_text(encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
