"""Write files and folders whole or not at all; and the file names that several parts know."""

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile

from filelock import FileLock, Timeout

from src.utils.errors import UserError
from src.utils.ranks import RANK

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}  # what a disk does during a run
ADAPTER = "adapter_config.json"  # PEFT's, beside the weights of an adapter
RECIPE = "training_config.yaml"  # beside a trained model: the config that it was trained with
METRICS = "metrics.jsonl"  # in a run's folder: every number that was logged
CHECKPOINT = "run.json"  # in every checkpoint: where the run stood
STEPS = "step-" + "[0-9]" * 8  # checkpoints; a copy under another name is its owner's
RECORD = "record.json"  # in a run's folder: where the run comes from and how it ended


def write_problem(path: Path) -> str | None:
    """Why a path that need not exist yet cannot be written; None if it can."""
    try:
        place = next(p for p in (path, *path.parents) if p.exists(follow_symlinks=False))
        with NamedTemporaryFile(prefix=f".{path.name}", dir=place):
            return None
    except OSError as error:
        return f"{path}: cannot be written: {error.strerror}"


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step: a reader, or a crash, sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Fill a temporary folder, then rename it to `path`: it appears whole, or not at all.

    Everything reaches the disk before the rename does, so that this holds for a power cut too.
    After an exception the temporary folder is removed; after a crash a `.tmp` folder remains,
    which the next writer of the same path replaces.

    Raises:
        FileExistsError: `path` exists; nothing is overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                # safetensors writes for the owner alone, whatever the umask allows to others.
                file.chmod(0o666 & ~umask)
            sync(file)
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


@contextmanager
def only_run_in(output: Path) -> Generator[None]:
    """Lock the output folder, so that a second run cannot write into the files of the first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in it: nothing is written inside before all checks are done.
    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        held = lock.acquire() if RANK == 0 else nullcontext()
    except Timeout:
        raise UserError(
            f"output_dir: another run is writing to {output}; wait for it or choose another"
        ) from None
    with held:
        yield


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_name(path: Path) -> Path:
    """The path, or with .1, .2, … behind it if it exists."""
    name, number = path, 0
    while name.exists():
        number += 1
        name = path.with_suffix(f".{number}")
    return name
