"""Put LoRA adapters on a model, new or saved ones, by PEFT."""

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from src.config import LoraConfig
from src.models.loading import check_numbers, explained, resolve
from src.utils.errors import UserError

# Kernels of these models use two weights directly and bypass their modules, so that adapters on
# them get no gradient.
MAMBA_MODELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
MAMBA_WEIGHTS = ["out_proj", "dt_proj"]
# PEFT warns of what a user can do nothing about, such as its own use of deprecated names. What
# matters, names and weights that do not fit, is an error here.
without_warnings = partial(warnings.catch_warnings, action="ignore")


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """Freeze the model and add adapters to train, in fp32 whatever the model's dtype is.

    Raises:
        UserError: `lora.target_modules` or `target_parameters` name nothing that can be adapted,
            or the saved adapter is absent, no LoRA, or made for another model.
    """
    saved = lora.adapter
    adapted = load_adapters(model, saved, True) if saved else _new_adapters(model, lora)
    for p in adapted.parameters():
        if p.requires_grad:  # PEFT leaves whole modules in bf16, which rounds most updates away
            p.data = p.data.float()
    return adapted


def _new_adapters(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    import peft

    _check_names(model, lora)
    bypassed = lora.target_modules == "all-linear" and model.config.model_type in MAMBA_MODELS
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        use_rslora=lora.rslora, use_dora=lora.dora,
        target_modules=lora.target_modules, target_parameters=lora.target_parameters,
        modules_to_save=lora.modules_to_save and list(lora.modules_to_save),  # PEFT adds to it
        ensure_weight_tying=bool(lora.modules_to_save),  # where they are tied
        exclude_modules=MAMBA_WEIGHTS if bypassed else None,
        auto_mapping={"base_model_class": type(model).__name__},  # for `load_adapters`
    )  # fmt: skip
    try:
        with without_warnings():
            return cast(PreTrainedModel, peft.get_peft_model(model, adapter))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        key = "parameters" if "target_parameters" in str(error) else "modules"
        raise UserError(f"lora.target_{key}: {str(error).splitlines()[0]}") from None


def _check_names(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuse names that match nothing, or stand in two lists: PEFT ignores them without a word.

    Raises:
        UserError: naming the key and the names.
    """
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = {"target_modules": layers, "modules_to_save": layers, "target_parameters": parameters}
    for key, known in keys.items():
        names = getattr(lora, key) or []
        names = [] if isinstance(names, str) else names  # a pattern: PEFT refuses it itself
        if missing := [n for n in names if not any(f".{k}".endswith(f".{n}") for k in known)]:
            raise UserError(f"lora.{key}: {type(model).__name__} has no {', '.join(missing)}")
    whole = {*(lora.modules_to_save or ())}
    if not isinstance(lora.target_modules, str) and (both := whole & {*lora.target_modules}):
        raise UserError(f"lora.target_modules: lora.modules_to_save too has {', '.join(both)}")


def base_of(model: nn.Module) -> Any:
    """The model without PEFT's wrapper."""
    return getattr(model, "get_base_model", lambda: model)()


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype to autocast to, for fp32 adapters on a base in half precision.

    fp32, which means no autocast, for a model without adapters: its weights have one dtype.
    """
    halves = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    return halves.pop() if halves and hasattr(model, "peft_config") else torch.float32


def adapted_names(model: nn.Module) -> list[str]:
    """The last parts of the names of the layers that have adapters."""
    names = (re.split(r"\.lora_(?:embedding_)?A\.", n) for n, _ in model.named_parameters())
    places = {place for place, *rest in names if rest}
    return sorted({place.rpartition(".")[2] for place in places} - {"base_layer"})


def frozen_experts(model: nn.Module) -> list[str]:
    """Experts without adapters, as `lora.target_parameters` names them.

    In transformers 5 the experts of a layer are one parameter of three dimensions and no
    nn.Linear, so `all-linear` skips them where PEFT does not know the architecture.
    """
    names = [
        ".".join([*place.split(".")[-2:], name])
        for place, module in model.named_modules()
        if not isinstance(module, nn.Conv1d) and "base_layer" not in place
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3
    ]
    return list(dict.fromkeys(names))


def load_adapters(
    model: PreTrainedModel, name: str | Path, is_trainable: bool = False
) -> PreTrainedModel:
    """Put saved adapters on the base that they were trained on.

    Args:
        model: the base.
        name: a folder or hub id.
        is_trainable: whether `lora.adapter` names it, to train it further.

    Raises:
        UserError: they are absent, damaged or made for another model; to train, they are no LoRA;
            or the base is in 8 bits, which PEFT's DoRA cannot read.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    what = f"{'lora.adapter: ' * is_trainable}{name}"
    with explained(what), without_warnings():
        name = resolve(str(name))
        config: Any = PeftConfig.from_pretrained(name)
        if is_trainable and config.peft_type != "LORA":
            raise UserError(f"{what}: a {config.peft_type} adapter; only LoRA can be trained here")
        if getattr(config, "use_dora", False) and getattr(model, "is_loaded_in_8bit", False):
            raise UserError(f"{what}: DoRA does not work on 8-bit weights; use 4bit or none")
        made_for = (config.auto_mapping or {}).get("base_model_class")
        if made_for not in {None, type(model).__name__}:  # other layers of the same shapes
            raise ValueError("size mismatch: another architecture")
        config.inference_mode = not is_trainable
        adapted = PeftModelForCausalLM(model, config)
        loaded = adapted.load_adapter(name, "default", is_trainable=is_trainable)
        others = [*loaded.missing_keys, *loaded.unexpected_keys]  # which PEFT only reports
        if any("lora_" in key for key in others):
            raise ValueError("size mismatch: a different number of layers")
        check_numbers(adapted, what)
    return cast(PreTrainedModel, adapted)


def stop_input_casts(model: nn.Module) -> None:
    """Stop PEFT from casting each adapter's input to fp32: autocast does the casts that are needed.

    PEFT's casts are kept for the backward pass: 6.98 instead of 5.98 MiB a token on an 8B model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010
