"""Checkpoints: weights, moments, random states, position; whole or absent, checked when read."""

import hashlib
import json
import random
import shutil
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from src.config import Config, LoraConfig, flatten
from src.data.dataset import Facts
from src.training.strategy import local, part_of
from src.utils.distributed import RANK, WORLD_SIZE, barrier, from_main, gather, is_main, on_main
from src.utils.environment import from_root
from src.utils.errors import RunError, UserError
from src.utils.files import new_folder

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"  # of a checkpoint that is not sharded
MOMENTS = "state.pt"  # of the optimizer where they are not sharded, and random states
SHARDS = "shard-{}-*"  # the files that DCP writes for one process, counted from 1
ADAM = {"exp_avg", "exp_avg_sq"}
# Keys that a resumed run must share with the one it continues.
IDENTITY = (
    *("seed", "model.name", "model.quantization", "lora", "data.max_length", "data.packing"),
    *("training.batch_size", "training.optimizer"),
)
WINDOW = "gradient_accumulation_steps x processes"


@dataclass
class TrainState:
    """Where a run stands: the plain numbers of a checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch that `position` is in
    position: int = 0  # microbatches of this epoch done, over all processes
    tokens: int = 0  # real tokens seen, filler not counted
    skipped: int = 0  # steps not taken, for want of labels or of finite numbers
    learning_rate: float | None = None  # of the next step; None: not known
    best_loss: float = float("inf")
    best_step: int | None = None
    evaluations_without_gain: int = 0

    def count(self, microbatches: int, tokens: int) -> None:
        """Remember an optimizer step."""
        self.step += 1
        self.position += microbatches
        self.tokens += tokens

    def is_best(self, loss: float) -> bool:
        """Remember an evaluation; whether it is better than all before."""
        self.evaluations_without_gain += 1
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_without_gain = loss, self.step, 0
        return self.best_step == self.step

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row were no better than the best one."""
        return patience is not None and self.evaluations_without_gain >= patience


@dataclass
class Training:
    """Everything that changes while training, which is exactly what a checkpoint holds."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    identity: dict[str, Any]  # what a resumed run must share with this one: see `identify`
    state: TrainState = field(default_factory=TrainState)

    def trained(self) -> dict[str, Tensor]:
        """The weights that train, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def moments(self) -> list[Tensor]:
        """What the optimizer keeps for them."""
        kept = [v for state in self.optimizer.state.values() for v in state.values()]
        return [v for v in kept if isinstance(v, Tensor)]

    def optimized(self) -> list[Tensor]:
        """The weights that train, in the optimizer's order, by which it numbers its moments."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def identify(config: Config, data: Facts) -> dict[str, Any]:
    """What makes two runs the same one: the model, the data and the geometry of a step."""
    same = {k: v for k, v in flatten(config.model_dump()).items() if k.startswith(IDENTITY)}
    rows = f"{config.data.train} ({data.fingerprint[:12]})"
    # So 2 processes that accumulate 4 go on where 8 processes accumulated none.
    window = config.training.gradient_accumulation_steps * WORLD_SIZE
    return same | {"data.train": rows, WINDOW: window}


def save_checkpoint(training: Training, folder: Path, keep: int) -> Path:
    """Write `folder/step-N`, then prune: the newest `keep` stay, and the best one.

    All processes call it, as each has random generators of its own; the main one writes.

    Raises:
        RunError: it could not be written, e.g. to a full disk; those before are untouched.
    """
    path = folder / f"step-{training.state.step:08d}"
    training.state.learning_rate = float(training.optimizer.param_groups[0]["lr"])
    if from_main(path.exists):  # saved by the loop, and now again by a signal
        return path
    try:
        with _folder_for_all(path) as temporary:
            _write(training, temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save on a full disk says "unexpected pos 704 vs 598": say what is the matter.
        tensors = [*training.trained().values(), *training.moments()]
        needed, free = sum(local(t).nbytes for t in tensors), shutil.disk_usage(folder).free
        why = str(error).splitlines()[0]
        if free < needed:
            sizes = f"it takes about {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free"
            why = f"the disk is full: {sizes}"
        newest, _ = newest_checkpoint(folder)
        left = f"{newest.name} before it is whole" if newest else "there is none before it"
        raise RunError(f"{path}: this checkpoint could not be written: {why}; {left}") from error
    on_main(prune, folder, keep, training.state.best_step)
    return path


@contextmanager
def _folder_for_all(path: Path) -> Generator[Path]:
    """`new_folder`, that all processes write into."""
    with new_folder(path) if is_main() else nullcontext(path.with_name(f".{path.name}.tmp")) as new:
        barrier()
        yield new
        barrier()


def _write(training: Training, folder: Path) -> None:
    """Each process its shards, if there are any; the main one all the rest."""
    states: dict[str, Any] = {"random": gather(_random_state())}
    # Of the optimizer its moments alone: learning rate and decay are configuration, and the rate
    # follows from the step. Saved, they would overrule what a resumed run was told.
    states |= {"moments": training.optimizer.state_dict()["state"]}
    states |= {"scaler": training.scaler.state_dict()}
    weights = {name: p.detach().contiguous() for name, p in training.trained().items()}
    if any(isinstance(p, DTensor) for p in weights.values()):
        moments = states.pop("moments")
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(_flat(weights, moments), storage_writer=writer)
    elif is_main():
        save_file(weights, folder / WEIGHTS)
    if is_main():
        torch.save(states, folder / MOMENTS)
        record = {"state": asdict(training.state), "identity": training.identity}
        (folder / "run.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    # Each reads back its own files, as one process would take long to read all.
    mine = [file for file in folder.iterdir() if file.match(SHARDS.format(f"{RANK + 1:05}"))]
    if is_main():
        mine += [file for file in folder.iterdir() if not file.match(SHARDS.format("*"))]
    checksums = gather([(file.name, _sha256(file)) for file in mine])
    if is_main():
        manifest = dict(sorted(chain.from_iterable(checksums)))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _flat(weights: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Both under names of one kind, as DCP keeps them in safetensors files."""
    named = {f"moments/{n}/{key}": v for n, kept in moments.items() for key, v in kept.items()}
    return {f"weights/{name}": weight for name, weight in weights.items()} | named


@torch.no_grad()
def load_weights(trained: dict[str, Tensor], path: Path) -> None:
    """Copy the weights of a checkpoint into these, whatever strategy saved it.

    Raises:
        UserError: it has others.
    """
    if (path / WEIGHTS).exists():
        saved = load_file(path / WEIGHTS)
    else:
        saved = {name.removeprefix("weights/") for name in _sharded(path, "weights/")}
    if set(saved) != trained.keys():
        raise UserError(f"{path}: its weights are not those of this model")
    if isinstance(saved, set):
        _load_shards(path, {f"weights/{name}": p.detach() for name, p in trained.items()})
        return
    for name, parameter in trained.items():
        parameter.copy_(part_of(saved[name], parameter))


def _load_moments(path: Path, whole: dict[int, dict], optimized: list[Tensor]) -> dict[int, dict]:
    """AdamW's moments as the optimizer's own parameters are sharded, or not."""
    if names := _sharded(path, "moments/"):
        moments = {
            n: {"step": torch.zeros(()), **{key: torch.zeros_like(p) for key in ADAM}}
            for n, p in enumerate(optimized)
            if f"moments/{n}/step" in names
        }
        _load_shards(path, _flat({}, moments))
        return moments
    for n, kept in whole.items():
        kept.update({key: part_of(kept[key], optimized[n]) for key in ADAM & kept.keys()})
    return whole


def _sharded(path: Path, prefix: str) -> set[str]:
    """The names of what a checkpoint keeps in shards."""
    if (path / WEIGHTS).exists():
        return set()
    names = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name for name in names if name.startswith(prefix)}


def _load_shards(path: Path, tensors: dict[str, Tensor]) -> None:
    alone = WORLD_SIZE == 1
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)


def load_checkpoint(training: Training, path: Path) -> None:
    """Put everything back as `save_checkpoint` found it, the random generators included.

    It may have been saved by more or fewer processes, and with another strategy.
    """
    load_weights(training.trained(), path)
    # weights_only: a checkpoint is data and must not be able to run code.
    saved = torch.load(path / MOMENTS, map_location="cpu", weights_only=True)
    moments = _load_moments(path, saved.get("moments", {}), training.optimized())
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if saved["scaler"]:  # empty where another dtype needed none: this run's scaler then starts anew
        training.scaler.load_state_dict(saved["scaler"])
    training.state = TrainState(**_record(path)["state"])
    if len(saved["random"]) > RANK:  # a process that was not there keeps its seed
        _set_random_state(saved["random"][RANK])


def find_checkpoint(wanted: str, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `training.resume` means, or None to start anew; and warnings.

    Raises:
        UserError: the one that is named is damaged, or all that are under `folder`.
    """
    if wanted == "never":
        return None, []
    if wanted == "auto":
        path, warnings = newest_checkpoint(folder)
        if warnings and path is None:
            anew = "training.resume=never with another output_dir starts anew"
            raise UserError(f"training.resume: no checkpoint under {folder} is whole; {anew}")
        return path, warnings
    if damage := find_damage(from_root(wanted)):
        raise UserError(f"training.resume: {wanted}: {damage}")
    return from_root(wanted), []


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a warning for each damaged one that was passed over."""
    warnings = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        if (damage := find_damage(path)) is None:
            return path, warnings
        warnings.append(f"{path}: {damage}; skipped")
    return None, warnings


def find_damage(path: Path, without: str = "") -> str | None:
    """What differs from the manifest: a missing, truncated or altered file; None if whole.

    `without` is a file that nobody will read.

    Checksums, because one flipped bit loads silently in safetensors' and torch's formats.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable manifest"
    for name, checksum in manifest.items():
        if name == without:
            continue
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != checksum:
            return f"{name} is not what was written (checksum)"
    return None


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Refuse to continue a run with another model, other data or another batch geometry.

    Raises:
        UserError: naming each difference.
    """
    # A key that did not exist when it was saved meant what its default means.
    saved = flatten({"lora": LoraConfig().model_dump()}) | _record(path)["identity"]
    cure = "start in another output_dir, or set training.resume_despite_changes=true"
    if differences := [
        f"training.resume: {k} was {saved.get(k)} in {path.name} and is {v} now; undo it, {cure}"
        for k, v in identity.items()
        if saved.get(k) != v
    ]:
        raise UserError(*differences)


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete old checkpoints, but not the best one, and nothing before a newer one is whole."""
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        if path.name != f"step-{best_step or -1:08d}":
            # Renamed first: a crash in the middle of the deletion leaves no half checkpoint.
            doomed = path.with_name(f".{path.name}.tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
    for leftover in folder.glob(".step-*.tmp"):  # these, and what a kill left half-written
        shutil.rmtree(leftover, ignore_errors=True)


def _record(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text(encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # weights_only loading accepts no numpy arrays
        "torch": torch.get_rng_state(),
        # This process's GPU alone: asking the others would start a context on each of them.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(saved: dict[str, Any]) -> None:
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])  # noqa: NPY002
    torch.set_rng_state(saved["torch"])
    if isinstance(saved["cuda"], Tensor) and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
