"""Load a tokenizer and a model as the config says; save what was trained, adapter or model."""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from src.config import LoraConfig, ModelConfig
from src.data.encoding import stop_token_ids
from src.models.adapters import add_adapters
from src.models.loading import check_numbers, explained, resolve
from src.utils.environment import from_root
from src.utils.errors import UserError


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The model's tokenizer; a missing chat template or pad token is filled in.

    Raises:
        UserError: there is none, or it is a slow one, which cannot say where its tokens begin in
            the text, or it has no EOS token.
    """
    tokenizer = _from_pretrained(AutoTokenizer, config)
    # Without its files transformers makes a tokenizer that has no words.
    usable = tokenizer is not None and tokenizer.is_fast and tokenizer.vocab_size > 1
    if not usable or tokenizer.eos_token is None:
        needed = "a fast tokenizer (a tokenizer.json) with an EOS token to stop at"
        raise UserError(f"model.name: {config.name}: needs {needed}")
    if config.chat_template or tokenizer.chat_template is None:
        template = from_root(config.chat_template or "configs/chat_template.j2")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        # Harmless here: labels come from lengths, so the real EOS keeps its label.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    config: ModelConfig, lora: LoraConfig | None, tokenizer: Tokenizer, device: torch.device,
    dtype: torch.dtype, trained_in: torch.dtype = torch.float32,
) -> PreTrainedModel:  # fmt: skip
    """Load or initialise the model, quantized or not, with adapters or all weights trainable.

    On the device `meta` it has shapes and no weights.

    `dtype` is what matmuls run in, by autocast. Frozen weights are kept in it. Without adapters,
    all weights are kept in `trained_in`, because bf16 would round small updates away. Adapters are
    kept in fp32.

    `peft.prepare_model_for_kbit_training` is not used: it turns norms, embeddings and head to
    fp32, and with them every activation between layers (+18 GB on an 8B model).

    Raises:
        UserError: the model is gated, absent, damaged or too large, or an option does not go with
            it: see each message.
    """
    weights = trained_in if lora is None else dtype
    if config.init == "random":  # on the CPU, so that every device begins with the same weights
        place = "meta" if device.type == "meta" else "cpu"
        model = without_weights(config, weights, place).to(device)
    else:
        model = read_weights(config, device, weights)
    model.config.use_cache = False  # with a cache, transformers does not see packed documents
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model.name: {config.name}: its tokenizer has {len(tokenizer)} tokens but the model "
            f"only {rows} embeddings. If you added tokens, call model.resize_token_embeddings("
            "len(tokenizer)), save both in a folder, name that, and with LoRA train the new rows: "
            "lora.modules_to_save=[embed_tokens,lm_head]"
        )
    if config.quantization != "none":
        _check_quantized(model, config)
    set_generation_config(model, tokenizer)
    if lora is not None:
        model = add_adapters(model, lora)
    if config.gradient_checkpointing is True:  # `auto` is decided in src/training/auto.py
        checkpoint_layers(model, config)
    return model.train()  # from_pretrained leaves it in evaluation mode


def set_generation_config(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Stop where the tokenizer's answers end, and repair what transformers refuses to save.

    Many published models have a temperature without `do_sample`, or values for beams without
    beams. transformers saves those unchanged, but raises once anything else is changed.
    """
    config = model.generation_config
    config.eos_token_id = stops_of(model, tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    for repair in ({"do_sample": True}, {"early_stopping": None, "length_penalty": None}):
        try:
            config.validate(strict=True)
        except ValueError:
            config.update(**repair)


def stops_of(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The stop tokens of the tokenizer and the chat template, and special ones of the base."""
    stops, base = stop_token_ids(tokenizer), model.generation_config.eos_token_id
    also = base if isinstance(base, list) else [base]
    return stops + [i for i in also if i in tokenizer.added_tokens_decoder and i not in stops]


def try_saving(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Save all but the weights into a temporary folder, so that nothing fails after training.

    Raises:
        UserError: transformers refuses to save one of the configs that it has loaded.
    """
    with TemporaryDirectory() as folder, explained(f"model.name: {model.name_or_path}"):
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(folder)


def save_model(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write adapter or full model with its tokenizer, as `from_pretrained` reads them.

    Args:
        model: with or without adapters.
        tokenizer: it is saved beside them.
        folder: to write into.
        dtype: of a full model's file, as models are published without their fp32 masters.
        state: the weights to save, if the model's own are sharded.
    """
    transformers_logging.disable_progress_bar()  # saving takes a moment
    set_generation_config(model, tokenizer)
    if hasattr(model, "peft_config"):
        # An adapter that was trained further may name the place where its base was before.
        cast(Any, model).peft_config["default"].base_model_name_or_path = model.name_or_path
        # False: else PEFT asks the hub whether the base's vocabulary has changed.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        # Without it, whoever loads the adapter elsewhere stops at the base's stop tokens.
        model.generation_config.save_pretrained(folder)
    else:
        state = {k: v.to(dtype) for k, v in (state or model.state_dict()).items()}
        model.save_pretrained(folder, state_dict=state)
        # That wrote the dtype of the fp32 masters, and use_cache=False, which only training needs.
        config = copy.deepcopy(model.config)
        config.dtype, config.use_cache = dtype, True
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def without_weights(
    config: ModelConfig, dtype: torch.dtype | None = None, device: str = "meta"
) -> PreTrainedModel:
    """The model that config.json describes, its weights not read but random; none on `meta`.

    Raises:
        UserError: as `build_model` does.
    """
    described, trusted = read_config(config), config.trust_remote_code
    with explained(f"model.name: {config.name}"), torch.device(device):
        return AutoModelForCausalLM.from_config(described, dtype=dtype, trust_remote_code=trusted)


def read_config(config: ModelConfig) -> Any:
    """The model's config.json as transformers understands it.

    Raises:
        UserError: as `build_model` does.
    """
    return _from_pretrained(AutoConfig, config)


def count_before_loading(config: ModelConfig) -> int:
    """How many parameters the model will have, from its config alone: seconds, no memory.

    Raises:
        UserError: as `build_model` does.
    """
    return without_weights(config).num_parameters()


def position_limit(config: Any) -> int | None:
    """How many positions a model has by its config.json; None with RoPE, which computes any.

    Beyond its table of positions a model (GPT-2, OPT) fails: on a GPU by an assertion that ends
    the process. Hybrids without positions (Nemotron-H) are held to what they were made for.
    """
    described = config.get_text_config()
    computed = getattr(described, "rope_parameters", None)
    return None if computed else getattr(described, "max_position_embeddings", None)


def check_positions(config: ModelConfig, max_length: int) -> None:
    """Refuse documents that are longer than the model has positions, before it is loaded.

    Raises:
        UserError: naming both; and as `build_model` does.
    """
    limit = position_limit(read_config(config))
    if limit and max_length > limit:
        problem = f"{max_length} is more than the {limit} positions of {config.name}"
        raise UserError(f"data.max_length: {problem}; use data.max_length={limit}")


def read_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Saved weights as they are, quantized or not, with the attention that transformers picks."""
    quantized = None
    if config.quantization != "none":
        from transformers import BitsAndBytesConfig

        quantized = BitsAndBytesConfig(
            **{f"load_in_{config.quantization}": True},
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            # Unset, bitsandbytes computes in fp32 without a warning, even inside bf16 autocast.
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == torch.float32 else dtype,
        )
    model, loaded = _from_pretrained(
        AutoModelForCausalLM, config, dtype=dtype, device_map={"": device},
        quantization_config=quantized, output_loading_info=True,
        use_safetensors=True,  # a pickled .bin can run code when it is read
    )  # fmt: skip
    if missing := sorted(loaded["missing_keys"]):  # transformers makes random ones, and warns
        lacks = f"{len(missing):,} weights that its config.json asks for are missing"
        raise UserError(f"model.name: {config.name}: {lacks}, such as {missing[0]}")
    check_numbers(model, config.name)
    return model


def _from_pretrained(kind: Any, config: ModelConfig, **options: Any) -> Any:
    """`kind.from_pretrained` of the model that a config names, as each part of it is read."""
    name, trusted = resolve(config.name), config.trust_remote_code
    with explained(f"model.name: {config.name}"):
        return kind.from_pretrained(name, trust_remote_code=trusted, **options)


def _check_quantized(model: PreTrainedModel, config: ModelConfig) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layers = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    if not layers:
        problem = "has no layer that bitsandbytes can quantize; use model.quantization=none"
        raise UserError(f"model.quantization: {config.name} {problem}")
    for layer in layers:
        assert getattr(layer, "compute_dtype", None) != torch.float32, "4-bit computes in fp32"
        # On CPUs with AVX512-BF16 the first evaluation repacks the weights for a kernel
        # that has no backward, for good: training goes on with wrong gradients.
        setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010


def checkpoint_layers(model: PreTrainedModel, config: ModelConfig) -> None:
    """Recompute the activations of every layer in the backward pass."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # transformers before 5.23; there the old name warns, and goes in 6
        enable = model.gradient_checkpointing_enable
    on_gpu = model.device.type != "cpu"
    # bitsandbytes' 8-bit matmul keeps its input where autograd's hooks do not see it: only the
    # reentrant kind, which runs the first forward pass without a graph, frees it.
    kind = {"use_reentrant": config.quantization == "8bit"}
    try:
        enable(kind, offload=config.gradient_checkpointing_offload and on_gpu)
    except ValueError as error:
        raise UserError(f"model.gradient_checkpointing: {error}") from None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, as transformers names them; none if it does not name them."""
    names = set(model._no_split_modules or [])
    return [m for m in model.modules() if type(m).__name__ in names]


def recompute_first(model: PreTrainedModel, count: int) -> None:
    """After `checkpoint_layers`, recompute the first `count` layers only.

    The last layers' activations are freed first, so the others have room when they are recomputed.
    """
    for number, layer in enumerate(decoder_layers(model)):
        setattr(layer, "gradient_checkpointing", number < count)  # noqa: B010


def compile_layers(model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each decoder layer in place: one graph, reused by all layers of a kind.

    Raises:
        UserError: transformers does not name the layers of this architecture.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError("model.compile: this architecture does not name its layers; set it false")
    # Of the default's activations, keep those that are not cheap to compute again: 40 instead of
    # 51 GiB for LoRA on 8B with 2 x 4096 tokens, at the same speed.
    functorch.activation_memory_budget = 0.9
    for layer in layers:
        layer.compile(backend=backend)
