"""Load a tokenizer and a model as the config says, and save what was trained."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.config import LoraConfig, ModelConfig
from src.data.encoding import stop_token_ids
from src.models.attention import isolates_documents, varlen_fits
from src.utils.environment import PROJECT_ROOT, from_root
from src.utils.errors import UserError

DEFAULT_CHAT_TEMPLATE = PROJECT_ROOT / "configs" / "chat_template.j2"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one; `cuda` without one is an error, not a slow surprise."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        reason = (
            "this torch was built without CUDA"
            if torch.version.cuda is None
            else f"no GPU, or a driver too old for CUDA {torch.version.cuda}: see nvidia-smi"
        )
        raise UserError(f"device: cuda is not available ({reason}); use device=auto or device=cpu")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype that matmuls run in; see `model.dtype` in src/config.py."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    # including_emulation=False: older GPUs emulate bf16, slower than fp32.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def resolve_name(name: str) -> str:
    """A local folder as an absolute path, so that an adapter finds its base from anywhere."""
    return str(from_root(name).resolve()) if from_root(name).is_dir() else name


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and a pad token in any case.

    Raises:
        UserError: there is none, or it cannot say where its tokens begin in the text.
    """
    with _explained(config):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_name(config.name), trust_remote_code=config.trust_remote_code
        )
    if tokenizer is None or not tokenizer.is_fast:
        raise UserError(f"model.name: {config.name}: needs a fast tokenizer (a tokenizer.json)")
    if tokenizer.eos_token is None:
        raise UserError(f"model.name: {config.name}: its tokenizer has no EOS token to stop at")
    if config.chat_template:
        tokenizer.chat_template = from_root(config.chat_template).read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        # Harmless here: labels come from lengths, so the real EOS keeps its label.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    config: ModelConfig,
    lora: LoraConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    packing: bool,
) -> PreTrainedModel:
    """Load or build the model, quantized or not, with adapters or all weights trainable.

    Weights that train are fp32, so that small updates are not rounded away; `dtype` is what
    matmuls run in, by autocast. Frozen weights are kept in `dtype` itself.

    `peft.prepare_model_for_kbit_training` is not used: it turns norms, embeddings and head to
    fp32, and with them every activation between layers (+18 GB on an 8B model).

    Raises:
        UserError: the model is gated, absent, damaged or too large a wish: see each message.
    """
    path = resolve_name(config.name)
    with _explained(config):
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    hf_config.use_cache = False  # with a cache, transformers no longer sees packed documents
    weights = torch.float32 if lora is None else dtype
    if config.init == "random":
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=weights, trust_remote_code=config.trust_remote_code
        ).to(device)
    else:
        with _explained(config):
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=hf_config,
                dtype=weights,
                quantization_config=_quantization(config.quantization),
                device_map={"": device},
                use_safetensors=True,  # a pickled .bin can run code when it is read
                trust_remote_code=config.trust_remote_code,
            )
    _check_loaded(model, config, tokenizer, packing)
    _set_attention(model, config.attention, packing, device, dtype)
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if lora is not None:
        model = _add_adapters(model, lora)
    if config.gradient_checkpointing:
        _checkpoint_layers(model, config.every_n_layers)
    if config.compile:
        _compile_layers(model)
    return model


def _quantization(kind: str) -> Any:
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # Unset, bitsandbytes computes in fp32, inside bf16 autocast too, and says nothing.
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _check_loaded(
    model: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, packing: bool
) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model.name: {config.name}: its tokenizer has {len(tokenizer)} tokens but the model "
            f"only {rows} embeddings; they do not belong together"
        )
    if config.quantization != "none":
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        layers = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
        if not layers:
            raise UserError(
                f"model.quantization: {config.name} has no layer that bitsandbytes can quantize "
                f"to {config.quantization}; use model.quantization=none"
            )
        slow = [m for m in layers if getattr(m, "compute_dtype", None) == torch.float32]
        assert not slow, "bitsandbytes would compute in fp32"
        for layer in layers:
            # On CPUs with AVX512-BF16 the first evaluation repacks the weights for a kernel
            # that has no backward, for good: training goes on with wrong gradients.
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010
    if packing and not isolates_documents(model):
        raise UserError(
            f"data.packing: {model.config.model_type} has layers that carry state from one packed "
            "document into the next; use data.packing=false"
        )


def _set_attention(
    model: PreTrainedModel, wanted: str, packing: bool, device: torch.device, dtype: torch.dtype
) -> None:
    if wanted == "auto":
        wanted = "varlen" if packing and varlen_fits(model.config, device, dtype) else "sdpa"
    if wanted == "varlen" and not packing:
        raise UserError("model.attention: varlen reads packed batches; set data.packing=true")
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise UserError(f"model.attention: {wanted}: {str(error).splitlines()[0]}") from None


def _add_adapters(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    import peft

    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        with _without_warnings():
            # The adapters are made in fp32 (autocast_adapter_dtype), the base stays as it is.
            return cast(PreTrainedModel, peft.get_peft_model(model, adapter))
    except ValueError as error:
        raise UserError(f"lora.target_modules: {str(error).splitlines()[0]}") from None


def _checkpoint_layers(model: PreTrainedModel, every_n_layers: int) -> None:
    # transformers 5.23 renamed it; the old name warns there, and goes in 6.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    try:
        enable(every_n_layers=every_n_layers)
    except ValueError as error:
        raise UserError(f"model.gradient_checkpointing: {error}") from None


def _compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer in place: one graph, reused by all layers of a shape."""
    names = set(model._no_split_modules or [])
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise UserError("model.compile: this architecture does not name its layers; set it false")
    for layer in layers:
        layer.compile()


@contextmanager
def _without_warnings() -> Generator[None]:
    """Peft 0.21 asks transformers 5.23 by a name that is deprecated: nothing a user can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


@contextmanager
def lean_adapters(model: PreTrainedModel) -> Generator[None]:
    """Keep PEFT from casting each adapter's input to fp32: autocast does what is needed.

    The casts are saved for the backward pass: 6.98 instead of 5.98 MiB a token on an 8B model.
    """
    if hasattr(model, "peft_config"):
        from peft.helpers import disable_input_dtype_casting

        with disable_input_dtype_casting(model):
            yield
    else:
        yield


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the weights it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        total += shape.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write adapter or full model with its tokenizer, as `from_pretrained` reads them.

    A full model is written in `dtype`, as models are published, not with its fp32 masters.
    """
    if hasattr(model, "peft_config"):
        # False: else PEFT asks the hub whether the base's vocabulary has changed.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        state = {k: v.to(dtype) for k, v in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state)
        # It has written the dtype of the fp32 masters, and use_cache=False, which is ours.
        config = copy.deepcopy(model.config)
        config.dtype, config.use_cache = dtype, True
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _explained(config: ModelConfig) -> Generator[None]:
    """Turn the many ways in which loading fails into one line that says what to do."""
    name = config.name
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        text = str(error)
        if "gated repo" in text or "401" in text or "403" in text:
            advice = (
                f"is gated: ask for access at huggingface.co/{name}, then put your token into "
                ".env as HF_TOKEN"
            )
        elif "trust_remote_code" in text:
            advice = (
                "ships its own Python code; read it, then set model.trust_remote_code=true to "
                "run it with your rights"
            )
        elif "couldn't connect" in text or "offline" in text.lower() or "not a valid model" in text:
            advice = (
                "is not on this machine and could not be fetched: check the name and the "
                "network, or give a local folder (gated models also need HF_TOKEN in .env)"
            )
        else:
            advice = f"could not be loaded: {text.strip().splitlines()[0]}"
        raise UserError(f"model.name: {name} {advice}") from None


def load_trained(
    folder: Path,
    device: torch.device,
    base: str | None = None,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what `save_model` wrote: a full model, or an adapter on its base.

    Args:
        folder: a run's `final`.
        device: where the model goes.
        base: the adapter's base model, if it is not where it was.
        quantization: of the base; None: what the adapter was trained on, because it learnt to
            make up for that rounding too.

    Returns:
        The model in evaluation mode with sdpa attention, and its tokenizer.

    Raises:
        UserError: the base is absent or gated, or a file is damaged.
    """
    settings: dict[str, Any] = {}
    if (folder / "training_config.yaml").is_file():
        settings = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
    trained = settings.get("model", {})
    adapter_file = folder / "adapter_config.json"
    name = str(folder.resolve())
    if adapter_file.is_file():
        name = (
            base or json.loads(adapter_file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        )
    if quantization is None:
        quantization = trained.get("quantization", "none") if adapter_file.is_file() else "none"
    config = ModelConfig.model_validate(
        {
            "name": name,
            "quantization": quantization,
            "trust_remote_code": trained.get("trust_remote_code", False),
        }
    )
    with _explained(config):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            resolve_name(name),
            dtype=pick_dtype("auto", device),
            quantization_config=_quantization(quantization),
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        )
        if adapter_file.is_file():
            from peft import PeftModel

            with _without_warnings():
                model = PeftModel.from_pretrained(model, folder)
    return cast(PreTrainedModel, model.eval()), cast(PreTrainedTokenizerBase, tokenizer)
