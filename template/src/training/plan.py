"""Plan the GPU memory of a config, without a GPU: count the bytes of a step on fake tensors.

The model is built from its config.json. Its tensors have shapes and dtypes and no data, and
operators on them compute nothing. The project's own training step runs on them, with the kernels
that a GPU would use, and every live storage is counted. So the plan cannot drift from the code.

Layers repeat. So models of a few layers are measured, and the figures are extrapolated.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface

from src.config import Config, changed
from src.data.batching import TokenBudgetSampler, full_batch
from src.data.dataset import TokenDataset
from src.models.adapters import add_adapters, base_of
from src.models.attention import attend_by_kernel, varlen_attention
from src.models.head import PlainHead, head_of
from src.models.model import check_positions, checkpoint_layers, without_weights
from src.training.fit import next_settings
from src.training.loss import Objective
from src.training.optimizer import MOMENTS, count_steps, dtype_of_trained
from src.training.speed import count_flops
from src.training.trainer import train_step
from src.utils.device import DTYPES
from src.utils.errors import UserError, first_line
from src.utils.memory import GIB

CPU = torch.device("cpu")  # device of the fake tensors: autocast works there without a GPU
BLOCK = 512  # bytes; the CUDA allocator rounds up to it
MAX_BATCH = 1024  # the largest `training.batch_size` that is tried
OVERHEAD = 1.0  # GiB: the CUDA context, cuBLAS' workspaces and what fragmentation wastes


@dataclass
class Plan:
    """GiB at the peak of a step, and its parts."""

    weights: float  # frozen or not, and adapters
    gradients: float
    moments: float  # of the optimizer
    activations: float  # what else lives at the peak: saved for the backward pass, logits, copies
    overhead: float = OVERHEAD  # an allowance: it is not counted
    peak_gib: float = 0.0  # the sum

    def __post_init__(self) -> None:
        self.peak_gib = sum(asdict(self).values())


class CannotPlan(UserError):
    """An operator of this model does not work on tensors without data."""


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live.

    Attributes:
        now: bytes that live.
        peaks: the most bytes up to the last layer's backward pass, and after it. Each is linear in
            the number of layers: the first grows by what a layer saves, the second by that or by
            its gradients. Their maximum is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known, self.now, self.peaks, self.phase = WeakIdKeyDictionary(), 0, [0, 0], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.count, func(*args, **(kwargs or {})))

    def count(self, tensor: Tensor) -> Tensor:
        """Add a tensor's storage, unless it is counted already; return the tensor."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._add(size)
            weakref.finalize(storage, self._add, -size)
        return tensor

    def _add(self, size: int) -> None:
        self.now += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)

    def watch(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Begin the second phase when the last layer, whose pre-hook this is, is done."""
        if inputs and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: setattr(self, "phase", 1))


def plan(config: Config) -> Plan:
    """Plan a step with a full microbatch, after the first step, when the moments exist.

    Its rows are not read: half of the tokens are taken as labelled. `model.dtype=auto` means bf16.

    Raises:
        UserError: there is no such model, or it has too few positions.
        CannotPlan: 8-bit weights.
        ValueError: the model supports none of these attentions.
    """
    check_positions(config.model, config.data.max_length)
    if config.model.quantization == "8bit":
        raise CannotPlan("8-bit weights cannot be planned; plan 4bit: an 8B takes 3.2 GiB less")
    # In the order of `set_attention`. The kernel has half precision only.
    packs = config.data.packing and _dtype(config) != torch.float32
    names = ["varlen_kernel"] * packs + ["sdpa"]
    if config.model.attention in {"sdpa", "eager"}:
        names = [config.model.attention]
    for attention in names:
        with suppress(ValueError):  # dropout in attention, or a cap on its scores
            return extrapolate(config, attention)
    return extrapolate(config, "eager")


# The GPU's kernel, on any device.
AttentionInterface.register("varlen_kernel", partial(varlen_attention, kernel=attend_by_kernel))


def _dtype(config: Config) -> torch.dtype:
    return DTYPES.get(config.model.dtype, torch.bfloat16)


def extrapolate(config: Config, attention: str) -> Plan:
    """Measure shallow models, and extrapolate each figure to the layers of the whole one.

    The first has the last two layers of each kind. Each other one has a third of one kind, and the
    difference is what a layer of that kind adds.
    """
    places = defaultdict(list)  # of each kind: layers of the same modules and sizes print alike
    for place, layer in enumerate(layers_of(without_weights(config.model))):
        places[str(layer)].append(place)

    def measure(third: str = "") -> np.ndarray:
        kinds = places.items()
        dropped = {n for kind, where in kinds for n in where[: -3 if kind == third else -2]}
        return measure_step(build(config, dropped), config, attention)

    total = first = measure()
    for kind, where in places.items():
        if len(where) > 2:
            total = total + (len(where) - 2) * (measure(kind) - first)
    *parts, first_peak, second_peak = (total / GIB).tolist()
    return Plan(*parts, activations=max(first_peak, second_peak) - sum(parts))


def layers_of(model: Any) -> Any:
    """The list of the model's decoder layers; empty if none is as long as its config says."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, ())


def measure_step(model: Any, config: Config, attention: str) -> np.ndarray:
    """Run a step on fake tensors: bytes of weights, gradients and moments, and two peaks."""
    mode, counter = FakeTensorMode(allow_non_fake_inputs=True), ByteCounter()
    settings = config.training
    batch = full_batch(settings.batch_size, config.data.max_length, packing=True, labelled=0.5)
    batch = tree_map_only(Tensor, mode.from_tensor, batch)
    with mode, counter:
        model = _with_fakes(model)
        model.set_attn_implementation(attention)
        for layer in layers_of(model)[-1:]:
            layer.register_forward_pre_hook(counter.watch)
        weights, counter.peaks = counter.now, [0, 0]  # of the step, not of making the weights
        head, backbone = head_of(model), base_of(model).base_model
        plain = type(head) is nn.Linear and head.bias is None
        objective = Objective(model, _dtype(config), PlainHead(backbone, head) if plain else None)
        trained = [p for p in model.parameters() if p.requires_grad]
        if settings.gradient_accumulation_steps > 1:
            for p in trained:  # the microbatch before has left gradients
                p.grad = torch.zeros_like(p)
        # Moments are counted by their formula: 8-bit AdamW asks the host. This steps on nothing.
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], fused=True)
        train_step(objective, [batch], optimizer, None, CPU, max_grad_norm=settings.max_grad_norm)
    moments = sum(p.numel() for p in trained) * MOMENTS[settings.optimizer]
    gradients, peaks = sum(p.nbytes for p in trained), np.array(counter.peaks) + moments
    return np.array([weights, gradients, moments, *peaks])


def plan_for(config: Config, gib: float) -> tuple[Config, Plan]:
    """Plan for a GPU with so many GiB, as `model.gradient_checkpointing=auto` decides there.

    Training recomputes as few layers as needed. Here it is none, if that fits, or every layer.

    Returns:
        The config, which says so, and its plan.

    Raises:
        CannotPlan: an operator does not work without data.
        UserError: as `plan`.
    """
    try:
        planned = plan(config)
        if planned.peak_gib > gib and config.model.gradient_checkpointing == "auto":
            config = changed(config, ["model.gradient_checkpointing=true"])
            planned = plan(config)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each operator has its own
        raise CannotPlan(f"{config.model.name} cannot be planned: {first_line(error)}") from None
    return config, planned


def largest_batch(config: Config, gib: float) -> int:
    """The largest `training.batch_size` that fits, up to MAX_BATCH; 0 if none does."""

    def peak_of(size: int) -> float:
        return plan(changed(config, [f"training.batch_size={size}"])).peak_gib

    if config.model.gradient_checkpointing == "auto":
        config = changed(config, ["model.gradient_checkpointing=true"])
    size = config.training.batch_size
    peak = peak_of(size)
    slope = (peak_of(2 * size) - peak) / size
    most = max(size, MAX_BATCH)
    guess = min(max(size + int((gib - peak) // slope), 1), most)
    # Memory is not quite linear in small batches: plan once more, near the answer.
    return min(max(guess + int((gib - peak_of(guess)) // slope), 0), most)


def cheapest_that_fits(config: Config, gib: float) -> tuple[str, float] | None:
    """The first changes, in the order of their cost, that bring the peak below so many GiB.

    Returns:
        The keys, for a command line, and the peak then in GiB; None if nothing fits.
    """
    changes: dict[str, str] = {}
    while options := next_settings(config):
        keys = options[0].split()
        config = changed(config, keys)
        changes |= dict(pair.split("=") for pair in keys)
        if (peak := plan(config).peak_gib) <= gib:
            return " ".join(map("=".join, changes.items())), peak
    return None


def cost(config: Config, data: TokenDataset) -> tuple[int, int, float]:
    """Count a run's steps, tokens and model FLOPs on one GPU from its rows.

    Returns:
        Steps; real tokens, each as often as it is trained on; the FLOPs that the model needs for
        them, without recomputation.
    """
    settings = config.training
    sampler = TokenBudgetSampler(
        data.lengths, config.data.max_length, settings.batch_size, config.data.packing, config.seed
    )
    steps = count_steps(settings, len(sampler))
    epochs = steps * settings.gradient_accumulation_steps / len(sampler)
    per_token, per_label = count_flops(build(config), data.lengths)
    tokens, labelled = int(data.lengths.sum()), data.facts.labelled_tokens
    return steps, int(epochs * tokens), epochs * (per_token * tokens + per_label * labelled)


def build(config: Config, dropped: Collection[int] = ()) -> nn.Module:
    """Build the model as it would be loaded, without weights, and without these layers."""
    settings, dtype = config.model, _dtype(config)
    stored = dtype_of_trained(config.training, dtype) if config.lora is None else dtype
    model = without_weights(settings, stored)
    layers = layers_of(model)
    for place in sorted(dropped, reverse=True):
        del layers[place]
    if dropped:
        model.config.get_text_config().num_hidden_layers = len(layers)
    if settings.quantization == "4bit":
        from bitsandbytes.functional import quantize_4bit
        from transformers import BitsAndBytesConfig
        from transformers.integrations import replace_with_bnb_linear

        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
        replace_with_bnb_linear(model, ["lm_head"], quantization_config=four_bit)
        setattr(model, "is_loaded_in_4bit", True)  # noqa: B010
        # bitsandbytes keeps the tables that its first call makes: with data, not fake ones.
        quantize_4bit(torch.zeros(64), compress_statistics=True)
    if config.lora is not None:
        model = add_adapters(model, config.lora.model_copy(update={"adapter": None}))
    if settings.gradient_checkpointing is True:
        checkpoint_layers(model, settings)
    return model.train()


def _with_fakes(model: nn.Module) -> Any:
    """Copy a model with a new tensor for each of its tensors; tied weights stay tied."""
    new: dict[int, Any] = {id(b): torch.empty_like(b, device=CPU) for b in model.buffers()}
    for weight in model.parameters():
        fake = torch.empty(weight.shape, dtype=weight.dtype, device=CPU)
        new[id(weight)] = nn.Parameter(fake, weight.requires_grad)
    copied: Any = copy.deepcopy(model, new)
    for layer in (m for m in copied.modules() if hasattr(m, "quant_state")):
        from bitsandbytes.functional import quantize_4bit

        weight = torch.empty(layer.weight.shape, dtype=layer.compute_dtype)
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        frozen: Any = nn.Parameter(packed, False)
        frozen.quant_state = layer.quant_state = state
        layer.weight = frozen
    return copied
