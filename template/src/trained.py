"""Find and load what training made: a run, its result, a checkpoint; or a model of others."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from src.config import Config, ModelConfig, load_config
from src.models.adapters import load_adapters
from src.models.model import build_model, explained, load_tokenizer, read_weights
from src.training.checkpoint import MOMENTS, find_damage, load_weights
from src.utils.device import pick_dtype
from src.utils.errors import UserError
from src.utils.files import ADAPTER, RECIPE


def load_trained(
    name: str | Path, device: torch.device, base: str | None = None, quantization: Any = None
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a full model, or an adapter on its base, to ask it.

    Args:
        name: what `src.preflight.find_trained` returned: a folder or a hub id.
        device: where the model goes.
        base: the adapter's base model, if it is not where it was.
        quantization: of the base; None: what the adapter was trained on, because it learnt to
            make up for that rounding too.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        UserError: the base is absent or gated, or a file is damaged.
    """
    logging.disable_progress_bar()  # of loading: answers are all that is printed
    folder = Path(name)
    if (folder / "run.json").is_file():
        return _load_checkpoint(folder, device)
    adapter, recipe = folder / ADAPTER, folder / RECIPE
    trained = yaml.safe_load(recipe.read_text("utf-8"))["model"] if recipe.is_file() else {}
    name = str(folder.resolve()) if folder.is_dir() else str(name)
    if adapter.is_file():
        name = base or json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]
        quantization = quantization or trained.get("quantization")
    trust = trained.get("trust_remote_code", False)
    config = ModelConfig(name=name, quantization=quantization or "none", trust_remote_code=trust)
    # In the attention that transformers picks: it understands padding and a cache.
    model = read_weights(config, device, pick_dtype("auto", device))
    if folder.is_dir():
        config = config.model_copy(update={"name": str(folder.resolve())})
    tokenizer = load_tokenizer(config)  # as training does: with a template in any case
    if adapter.is_file():
        with explained(str(folder)):
            model = load_adapters(model, folder)
    return model.eval(), tokenizer


def _load_checkpoint(path: Path, device: torch.device) -> tuple[PreTrainedModel, Tokenizer]:
    """The weights of a checkpoint, in the model that its run's config describes."""
    own = (path / "config.yaml").is_file()  # one that MLflow kept
    config, dtype = config_of(path if own else path.parent.parent), pick_dtype("auto", device)
    if damage := find_damage(path, without=MOMENTS):
        raise UserError(f"{path}: {damage}")
    tokenizer = load_tokenizer(config.model)
    model = build_model(config.model, config.lora, tokenizer, device, dtype, trained_in=dtype)
    load_weights({n: p for n, p in model.named_parameters() if p.requires_grad}, path)
    return model.eval(), tokenizer


def config_of(run: Path) -> Config:
    """The config of a run's folder.

    Raises:
        UserError: there is none.
    """
    return load_config(run / "config.yaml")[0]
