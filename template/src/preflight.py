"""Check files, folders and first rows of a run before torch is imported."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from src.config import Config, ModelConfig
from src.data.rows import check_sources
from src.utils.environment import PROJECT_ROOT, from_root, hf_home
from src.utils.errors import UserError
from src.utils.files import ADAPTER, CHECKPOINT, METRICS, STEPS, write_problem

MODEL_FILES = (
    "*config.json",
    "tokenizer.json",
    "*.index.json",
    "*.jinja",
    "tokenizer.model",
    "model*.safetensors",
    "adapter_model.*",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
TRACES = (METRICS, "checkpoints", "final")  # that a run leaves in its folder


def check_run(config: Config, output: bool = True) -> None:
    """Check the model's folder, the first rows of local data, and the output folder.

    Args:
        config: of the run.
        output: whether a run will write into the output folder.

    Raises:
        UserError: with a line for each problem.
    """
    problems = list(_model_problems(config.model))
    if config.lora and config.lora.adapter:
        problems += _adapter_problems(config.lora.adapter)
    for key, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        try:
            if isinstance(sources, str | list):
                check_sources(sources, config.data)
        except UserError as error:
            problems += [f"{key}: {problem}" for problem in error.problems]
    if problem := write_problem(hf_home()):  # the tokens of rows are kept there
        problems.append(f"HF_HOME: {problem}")
    problems += _output_problems(config) if output else ()
    if problems:
        raise UserError(*problems)


def folder_problems(folder: Path, key: str) -> Iterator[str]:
    """Yield what is wrong with the files of a saved model or adapter, a line for each file.

    Args:
        folder: that exists.
        key: the key or option that named it, and its name.
    """
    files = [file for pattern in MODEL_FILES for file in sorted(folder.glob(pattern))]
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    files += [folder / shard for shard in sorted({*shards}) if folder / shard not in files]
    if (folder / ADAPTER).is_file() and not any(folder.glob("adapter_model.*")):
        files.append(folder / "adapter_model.safetensors")  # is missing
    for file in files:
        if damage := _damage(file):
            yield f"{key}/{file.name}: {damage}"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, which `folder_problems` reports."""
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


def _damage(file: Path) -> str:
    """What is wrong with a file of a model, and what to do; empty if nothing is."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return "is a Git LFS pointer and not the file: run `git lfs pull` where you cloned it"
        if not start:
            return "is empty: fetch it again"
        if file.suffix == ".safetensors":
            with safe_open(file, "numpy"):  # reads the header, and compares it with the size
                pass
        # A large tokenizer.json takes half a second.
        elif file.suffix == ".json" and file.stat().st_size < 2**20:
            json.loads(file.read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        return f"cannot be read ({error}): fetch it again"
    return ""


def _model_problems(model: ModelConfig) -> Iterator[str]:
    folder, key = from_root(model.name), f"model.name: {model.name}"
    if model.chat_template and not from_root(model.chat_template).is_file():
        yield f"model.chat_template: {model.chat_template}: no such file"
    if (folder / ADAPTER).is_file():
        yield f"{key}: an adapter; name its base model here, and the adapter as lora.adapter"
    elif folder.is_dir():
        yield from folder_problems(folder, key)
        if model.init == "pretrained" and not any(folder.glob("*.safetensors")):
            yield (
                f"{key}: no safetensors weights in it (a run's are in final/); model.init=random "
                "builds fresh ones (pickled ones can run code when they are read: convert them)"
            )
    elif is_local(model.name):
        yield f"{key}: no such folder, and not a hub id (org/name)"


def _adapter_problems(name: str) -> Iterator[str]:
    folder, key = from_root(name), f"lora.adapter: {name}"
    if (folder / ADAPTER).is_file():
        yield from folder_problems(folder, key)
    elif folder.is_dir() or is_local(name):
        yield f"{key}: neither a folder with {ADAPTER} (as a run's final/) nor a hub id (org/name)"


def is_local(name: str) -> bool:
    """Whether a name cannot be a hub id."""
    return name.startswith((".", "/", "~", "configs/", "outputs/")) or name.count("/") > 1


def _output_problems(config: Config) -> Iterator[str]:
    output, resume = from_root(config.output_dir), config.training.resume
    kept = (CHECKPOINT, STEPS, f"checkpoints/{STEPS}")  # in a checkpoint, checkpoints/ and a run
    # A file beside the output folder locks it.
    if PROJECT_ROOT.is_relative_to(os.path.realpath(output)):
        yield f"output_dir: {config.output_dir}: the project is in it; give a run its own folder"
    elif problem := write_problem(output) or write_problem(output.parent):
        yield f"output_dir: {problem}"
    elif resume == "never" and any((output / name).exists() for name in TRACES):
        yield (
            f"output_dir: {config.output_dir} holds a run already, and nothing is overwritten; "
            "training.resume=auto continues it, another output_dir=… starts anew"
        )
    elif resume not in {"never", "auto"} and not any(any(from_root(resume).glob(p)) for p in kept):
        yield f"training.resume: {resume}: not never, auto, or the folder of a checkpoint or run"
