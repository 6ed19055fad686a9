"""Find and load what training made, or another saved model; and the command lines that name it."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import DEFAULTS, Config, load_config
from src.preflight import folder_problems, is_local, read_json
from src.utils.environment import from_root
from src.utils.errors import UserError
from src.utils.files import ADAPTER, CHECKPOINT, RECIPE, RECORD

if TYPE_CHECKING:  # only loading needs torch
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

KINDS = {CHECKPOINT: "checkpoint", ADAPTER: "adapter", "config.json": "model"}


@dataclass(frozen=True)
class Trained:
    """A saved model that was found and checked, and is not loaded yet."""

    name: str  # its folder, or its hub id
    kind: str  # checkpoint, adapter or model
    base: str  # the model whose weights are read first: of a checkpoint or an adapter, or itself
    config: Config  # what it was trained with; DEFAULTS: no run of this project made it


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the script that runs; --help prints the description as it is."""
    return argparse.ArgumentParser(
        prog=f"uv run scripts/{Path(sys.argv[0]).name}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip


def between(least: float, most: float, kind: type = int) -> Callable[[str], float]:
    """Return the `type` of an option that is a number from `least` to `most`."""

    def number(text: str) -> float:
        if not least <= (value := kind(text)) <= most:  # nan is not
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return value

    return number


def make_model_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all scripts that generate with a model."""
    parser, default = make_parser(description), "(default: %(default)s)"
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run's folder, any saved model, a hub id or an MLflow URI")
    add("--base", help="folder or hub id of the adapter's or checkpoint's base, if it has moved")
    length = f"tokens of an answer at most {default}"
    add("--max-length", type=between(1, 2**31), default=256, help=length)
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help=default)
    return parser


def find_trained(name: str, base: str | None = None) -> Trained:
    """The saved model that a script's MODEL means, checked before anything is loaded.

    Args:
        name: a run's folder, its `final/`, a checkpoint, any saved model, a hub id, or an MLflow
            URI (`models:/...`, `runs:/...`), whose files are fetched.
        base: the base of an adapter or a checkpoint, if it has moved.

    Raises:
        UserError: it is no saved model, its base or its config is absent, or a file is damaged.
    """
    if name.startswith(("models:/", "runs:/")):
        name = _from_mlflow(name)
    found = Trained(name, "model", name, DEFAULTS)
    if from_root(name).is_dir():
        found = _in_folder(from_root(name), base)
    elif is_local(name):
        raise UserError(f"{name}: no such folder; training prints where its model is")
    if base and found.kind == "model":
        raise UserError(f"--base goes with an adapter or a checkpoint; {name} is a whole model")
    source = from_root(found.base)
    if not source.is_dir() and is_local(found.base):
        raise UserError(f"{found.name}: its base model is not at {source}; give it with --base")
    for place in (from_root(found.name), source):
        if problems := [*folder_problems(place, str(place))]:
            raise UserError(*problems)
    if found.kind == "adapter" and found.base == found.name:
        raise UserError(f"{found.name}: its {ADAPTER} names no base model; give it with --base")
    return found


def _in_folder(folder: Path, base: str | None) -> Trained:
    """The saved model in a folder, or in the `final/` of a run."""
    places = [(place, file) for place in (folder, folder / "final") for file in KINDS]
    there = next((each for each in places if Path(*each).is_file()), None)
    if there is None:
        problem = f"no config.json or {ADAPTER} in it: not a saved model"
        raise UserError(f"{folder}: {problem}; a run that has not finished has its checkpoints")
    folder, kind = there[0], KINDS[there[1]]
    if kind == "checkpoint":
        own = folder / "config.yaml"  # of a checkpoint that was copied out of its run
        own = own if own.is_file() else folder.parent.parent / own.name
        config = load_config(own, stored=True)
        return Trained(str(folder), kind, base or config.model.name, config)
    recipe, config = folder / RECIPE, DEFAULTS
    if recipe.is_file():
        config = load_config(recipe, stored=True)
    own = read_json(folder / ADAPTER).get("base_model_name_or_path") or str(folder)
    return Trained(str(folder), kind, base or own, config)


def find_runs(names: list[str]) -> list[Path]:
    """Return the output folders of runs.

    Raises:
        UserError: a folder holds no run.
    """
    folders = [from_root(name) for name in names]
    if unknown := [folder for folder in folders if not (folder / RECORD).is_file()]:
        raise UserError(*(f"{folder}: no {RECORD} in it: not a run's folder" for folder in unknown))
    return folders


def _from_mlflow(uri: str) -> str:
    import mlflow

    from src.training.tracking import connect, tracking_uri

    connect()
    mlflow.set_tracking_uri(tracking_uri())
    try:
        return mlflow.artifacts.download_artifacts(uri)
    except Exception as error:  # noqa: BLE001 - whatever its store raises
        raise UserError(f"{uri}: {str(error).splitlines()[0]}") from None


def load_trained(
    found: Trained, device: "torch.device", quantization: Any = None
) -> "tuple[PreTrainedModel, Tokenizer]":
    """Load a full model, an adapter on its base, or a checkpoint, to generate with it.

    Args:
        found: by `find_trained`.
        device: where the model goes.
        quantization: of the base; None: what the adapter was trained on, because it learnt to
            make up for that rounding too.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        UserError: the base is absent, gated or another one, or a file is damaged.
    """
    from transformers.utils import logging

    from src.models.adapters import load_adapters
    from src.models.model import build_model, load_tokenizer, read_weights
    from src.training.checkpoint import MOMENTS, find_damage, load_weights
    from src.utils.device import pick_dtype

    logging.disable_progress_bar()  # of loading: only answers are printed
    folder, dtype, own = Path(found.name), pick_dtype("auto", device), found.config.model
    base = {"name": found.base, "quantization": quantization or own.quantization}
    settings = own.model_copy(update=base)
    if found.kind == "checkpoint":
        if damage := find_damage(folder, skip_folder=MOMENTS):
            raise UserError(f"{folder}: {damage}")
        tokenizer = load_tokenizer(settings)
        model = build_model(settings, found.config.lora, tokenizer, device, dtype, trained_in=dtype)
        load_weights(model, folder)
        return model.eval(), tokenizer
    saved = {"name": found.name, "chat_template": None}  # the tokenizer is saved with its template
    tokenizer = load_tokenizer(settings.model_copy(update=saved))
    # With the attention that transformers picks, which supports padding and a cache.
    model = read_weights(settings, device, dtype)
    if found.kind == "adapter":
        model = load_adapters(model, folder)
    return model.eval(), tokenizer
