"""Put LoRA adapters on a model, new or saved ones, by PEFT."""

import re
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from src.config import LoraConfig
from src.utils.environment import from_root
from src.utils.errors import UserError

# They read these two weights past the layer, so that an adapter there learns nothing.
MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """Freeze the model and add adapters to train, in fp32 whatever the model's dtype is.

    Raises:
        UserError: `lora.target_modules` or `target_parameters` name nothing that can be adapted,
            or the saved adapter is absent, no LoRA, or made for another model; or DoRA would
            divide by zero.
    """
    adapted = _go_on(model, lora.adapter) if lora.adapter else _begin(model, lora)
    for name, p in adapted.named_parameters():
        if p.requires_grad:  # PEFT leaves whole modules in bf16, which rounds most updates away
            p.data = p.data.float()
        if "lora_magnitude_vector" in name and not p.is_meta and not p.all():
            layer = name.partition(".lora_magnitude_vector")[0].rpartition(".")[2]
            raise UserError(
                f"lora.dora: a row of {layer} is zero, and DoRA divides by its length (often the "
                "padding token's); leave the layer out of lora.target_modules, or lora.dora=false"
            )
    return adapted


def _begin(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    import peft

    _check_names(model, lora)
    past = MAMBA if lora.target_modules == "all-linear" else ()
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        use_rslora=lora.rslora, use_dora=lora.dora,
        target_modules=lora.target_modules, target_parameters=lora.target_parameters,
        modules_to_save=lora.modules_to_save and list(lora.modules_to_save),  # PEFT adds to it
        ensure_weight_tying=bool(lora.modules_to_save) and _is_tied(model),
        exclude_modules=["out_proj", "dt_proj"] if model.config.model_type in past else None,
    )  # fmt: skip
    try:
        with _silent():
            return cast(PreTrainedModel, peft.get_peft_model(model, adapter))
    except (ValueError, TypeError, re.error) as error:
        key = "parameters" if "target_parameters" in str(error) else "modules"
        raise UserError(f"lora.target_{key}: {str(error).splitlines()[0]}") from None


def _check_names(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuse names that match nothing: PEFT ignores them as long as one other name matches.

    Raises:
        UserError: naming the key, the names, and the embeddings and head that the model has.
    """
    layers = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for key, known in (
        ("target_modules", layers),
        ("target_parameters", parameters),
        ("modules_to_save", layers),
    ):
        names = getattr(lora, key) or ()
        if isinstance(names, str):  # all-linear, or a pattern
            continue
        missing = [n for n in names if not any(f".{k}".endswith(f".{n}") for k in known)]
        if missing:
            ends = ", ".join(embedding_names(model))
            raise UserError(
                f"lora.{key}: {type(model).__name__} has no {', '.join(missing)}"
                + f"; its embeddings and head are {ends}" * (key == "modules_to_save")
            )


def embedding_names(model: PreTrainedModel) -> list[str]:
    """The input embeddings and the head, as `lora.modules_to_save` names them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [n.rpartition(".")[2] for n, m in model.named_modules() if any(m is e for e in ends)]


def _go_on(model: PreTrainedModel, name: str) -> PreTrainedModel:
    from peft import PeftConfig

    folder = from_root(name)
    name = str(folder.resolve()) if folder.is_dir() else name
    try:
        if (kind := PeftConfig.from_pretrained(name).peft_type) != "LORA":
            raise ValueError(f"a {kind} adapter, and this project trains LoRA alone")
        return load_adapters(model, name, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()
        if "size mismatch" in str(error):
            why = [f"made for another model than {model.name_or_path}"]
        raise UserError(f"lora.adapter: {name}: {why[0]}") from None


def _is_tied(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return cast(Any, head) is not None and head.weight is embeddings.weight


def head_of(model: nn.Module) -> Any:
    """The layer that makes logits now, or None.

    Of a head in `lora.modules_to_save` that is PEFT's copy, and the original while adapters are
    disabled.
    """
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if not hasattr(head, "modules_to_save"):
        return head
    return head.original_module if head.disable_adapters else head.modules_to_save["default"]


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype to autocast to where adapters, kept in fp32, meet a base in half precision.

    fp32, which is no autocast, for a model without adapters: its weights are of one dtype.
    """
    halves = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    return halves.pop() if halves and hasattr(model, "peft_config") else torch.float32


def adapted_names(model: nn.Module) -> list[str]:
    """The layers that adapters were put on, by the last part of their names."""
    places = {n.partition(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    return sorted({place.rpartition(".")[2] for place in places} - {"base_layer"})


def frozen_experts(model: nn.Module) -> list[str]:
    """Experts that no adapter reaches, as `lora.target_parameters` names them.

    In transformers 5 the experts of a layer are one parameter of three dimensions and no
    nn.Linear, so that `all-linear` passes them over where PEFT does not know the architecture.
    """
    found: dict[str, None] = {}
    for place, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim == 3 and not isinstance(module, nn.Conv1d) and "base_layer" not in place:
                found[".".join([*place.split(".")[-2:], name])] = None
    return list(found)


def load_adapters(
    model: PreTrainedModel, name: str | Path, is_trainable: bool = False
) -> PreTrainedModel:
    """Put saved adapters on the base that they were trained on.

    Raises:
        UserError: the base is in 8 bits, which PEFT's DoRA cannot read.
    """
    from peft import PeftConfig, PeftModel

    dora = getattr(PeftConfig.from_pretrained(str(name)), "use_dora", False)
    if dora and getattr(model, "is_loaded_in_8bit", False):
        raise UserError(f"{name}: a DoRA adapter does not work on 8-bit weights; use 4bit or none")
    with _silent():
        return cast(
            PreTrainedModel, PeftModel.from_pretrained(model, name, is_trainable=is_trainable)
        )


def without_input_casts(model: nn.Module) -> AbstractContextManager:
    """Keep PEFT from casting each adapter's input to fp32: autocast does what is needed.

    The casts are saved for the backward pass: 6.98 instead of 5.98 MiB a token on an 8B model.
    """
    if not hasattr(model, "peft_config"):
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)


@contextmanager
def _silent() -> Generator[None]:
    """Without three warnings that no user can mend.

    PEFT 0.21 asks transformers 5.23 by a name that is deprecated, and looks among the layers for
    the experts that it adapts as parameters. Torch tells that weights are not copied into a model
    which has shapes alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for told in ("The following (rank|alpha)_pattern keys", "for .*: copying from a non-meta"):
            warnings.filterwarnings("ignore", told)
        yield
