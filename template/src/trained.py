"""Find and load what training made: a run, its result, a checkpoint; or another saved model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.config import Config, ModelConfig, load_config
from src.preflight import folder_problems, has_tokenizer, is_local, read_json
from src.utils.environment import from_root
from src.utils.errors import UserError, first_line
from src.utils.files import ADAPTER, CHECKPOINT, RECIPE, RECORD, STEPS

if TYPE_CHECKING:  # only loading needs torch
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


def find_trained(name: str, base: str | None = None) -> str:
    """The folder or hub id that a script's MODEL means, checked before anything is loaded.

    Args:
        name: a run's folder, its `final/`, a checkpoint, any saved model, a hub id, or an MLflow
            URI (`models:/...`, `runs:/...`), whose files are fetched.
        base: the base of an adapter or a checkpoint, if it has moved.

    Raises:
        UserError: it is no saved model, lacks its tokenizer or its base, or a file is damaged.
    """
    if name.startswith(("models:/", "runs:/")):
        name = _from_mlflow(name)
    folder = from_root(name)
    if not folder.is_dir():
        if is_local(name):
            raise UserError(f"{name}: no such folder; training prints where its model is")
        if base:
            raise UserError(f"--base goes with a folder, and {name} is a hub id")
        return name
    kinds = (CHECKPOINT, ADAPTER, "config.json")
    places = [p for p in (folder, folder / "final") if any((p / kind).is_file() for kind in kinds)]
    if not places and (newest := sorted(folder.glob(f"checkpoints/{STEPS}"))[-1:]):
        more = f"ask {newest[0]}, or finish it with training.resume=auto"
        raise UserError(f"{folder}: a run that has not finished: {more}")
    if not places:
        raise UserError(f"{folder}: no config.json or {ADAPTER}: not a saved model")
    folder = places[0]
    if not (folder / CHECKPOINT).is_file():  # whose files have checksums
        _require_whole(folder)
        if not has_tokenizer(folder):
            raise UserError(f"{folder}: no tokenizer; save one with tokenizer.save_pretrained")
        if base and not (folder / ADAPTER).is_file():
            raise UserError(f"--base goes with an adapter, and {folder} is a whole model")
    source = _source(folder, base)
    if from_root(source).is_dir():
        _require_whole(from_root(source))
    elif is_local(source):
        cure = "" if base else "; give its place with --base"
        raise UserError(f"{folder}: its base model is not at {source}{cure}")
    return str(folder)


def _require_whole(folder: Path) -> None:
    if problems := [*folder_problems(folder, str(folder))]:
        raise UserError(*problems)


def _source(folder: Path, base: str | None) -> str:
    """The model whose weights are read first: the base of an adapter or checkpoint, or itself."""
    if (folder / CHECKPOINT).is_file():
        own = _checkpoint_config(folder).model.name
        return base or own
    if (folder / ADAPTER).is_file():
        if source := base or read_json(folder / ADAPTER).get("base_model_name_or_path"):
            return source
        raise UserError(f"{folder / ADAPTER}: names no base model; give it with --base")
    return str(folder)


def _checkpoint_config(folder: Path) -> Config:
    places = folder / "config.yaml", folder.parent.parent / "config.yaml"
    for path in places:
        if path.is_file():
            return load_config(path)[0]
    raise UserError(f"{folder}: a checkpoint out of its run: copy the run's config.yaml into it")


def trained_config(folder: str) -> Config | None:
    """Read the config that a saved model was trained with; None if no run of this project made it.

    Args:
        folder: what `find_trained` returned.
    """
    if Path(folder, CHECKPOINT).is_file():
        return _checkpoint_config(Path(folder))
    path = Path(folder) / RECIPE
    return load_config(path)[0] if path.is_file() else None


def _saved_settings(recipe: Path) -> ModelConfig:
    """How a saved model is loaded; its config may have keys that a later version has not."""
    try:
        written = yaml.safe_load(recipe.read_text("utf-8"))["model"] if recipe.is_file() else {}
        keys = ("quantization", "trust_remote_code")
        return ModelConfig(name="-", **{key: written[key] for key in keys if key in written})
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        problem = f"is damaged: {first_line(error)}; the run's config.yaml is its copy"
        raise UserError(f"{recipe}: {problem}") from None


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
        moved = "; if the project has moved, scripts/sync.py on a run of before says how to link it"
        raise UserError(f"{uri}: {str(error).splitlines()[0]}{moved}") from None


def load_trained(
    name: str | Path, device: "torch.device", base: str | None = None, quantization: Any = None
) -> "tuple[PreTrainedModel, Tokenizer]":
    """Load a full model, an adapter on its base, or a checkpoint, to generate with it.

    Args:
        name: what `find_trained` returned: a folder or a hub id.
        device: where the model goes.
        base: the base model, if it is not where it was.
        quantization: of the base; None: what the adapter was trained on, because it learnt to
            make up for that rounding too.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        UserError: the base is absent, gated or another one, or a file is damaged.
    """
    from transformers.utils import logging

    from src.models.adapters import base_of, load_adapters
    from src.models.model import build_model, load_tokenizer, read_weights
    from src.training.checkpoint import MOMENTS, architecture_of, find_damage, load_weights
    from src.utils.device import pick_dtype

    logging.disable_progress_bar()  # of loading: only answers are printed
    folder, dtype = Path(name), pick_dtype("auto", device)
    is_checkpoint, is_adapter = ((folder / file).is_file() for file in (CHECKPOINT, ADAPTER))
    trained = _checkpoint_config(folder) if is_checkpoint else None
    settings = trained.model if trained else _saved_settings(folder / RECIPE)
    kind = quantization or (settings.quantization if is_checkpoint or is_adapter else "none")
    settings = settings.model_copy(update={"name": _source(folder, base), "quantization": kind})
    if trained:
        if damage := find_damage(folder, skip_folder=MOMENTS):
            raise UserError(f"{folder}: {damage}")
        tokenizer = load_tokenizer(settings)
        model = build_model(settings, trained.lora, tokenizer, device, dtype, trained_in=dtype)
        if type(base_of(model)).__name__ != architecture_of(folder):
            raise UserError(f"{folder} was made for another model than {settings.name}")
        load_weights({n: p for n, p in model.named_parameters() if p.requires_grad}, folder)
    else:
        # With the attention that transformers picks, which supports padding and a cache.
        model = read_weights(settings, device, dtype)
        tokenizer = load_tokenizer(settings.model_copy(update={"name": str(folder)}))
    if is_adapter:
        model = load_adapters(model, folder)
    return model.eval(), tokenizer
