"""What a config will take of a GPU's memory, found without one: the step on tensors without data.

The model is built from its config.json alone, as fake tensors: operators know their shapes and
dtypes and compute nothing. The project's own step is walked on them, by the kernels that a GPU
would take, and every storage that lives is counted. So the plan cannot drift from the code.
"""

import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from src.config import Config, changed
from src.data.batching import TokenBudgetSampler, full_batch
from src.data.dataset import TokenDataset
from src.models.adapters import add_adapters, head_of, without_input_casts
from src.models.model import check_positions, checkpoint_layers, without_weights
from src.training.loss import CHUNK, Objective, PlainHead
from src.training.optimizer import MOMENTS, count_steps, dtype_of_trained, make_optimizer
from src.training.out_of_memory import next_settings
from src.training.speed import count_flops
from src.training.trainer import train_step
from src.utils.device import DTYPES
from src.utils.memory import GIB

CPU = torch.device("cpu")  # which the fake tensors are said to be on: autocast works there
EIGHT = "adamw8bit"
BLOCK = 512  # bytes; the CUDA allocator rounds up to it
MOST_ROWS = 1024  # nobody needs more in a microbatch
OVERHEAD = 1.0  # GiB: the CUDA context, cuBLAS' workspaces and what fragmentation wastes


@dataclass
class Plan:
    """GiB at the peak of a step, and its parts."""

    weights: float  # frozen or not, and adapters
    gradients: float
    moments: float  # of the optimizer
    activations: float  # what else lives at the peak: saved for the backward pass, logits, copies
    overhead: float = OVERHEAD  # not counted but allowed for
    peak_gib: float = 0.0  # all of them

    def __post_init__(self) -> None:
        parts = asdict(self)
        self.peak_gib = sum(v for k, v in parts.items() if k != "peak_gib")


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self.count(made)
        return out

    def count(self, tensor: Tensor) -> None:
        """Add a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.known[storage] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def plan(config: Config, dtype: torch.dtype | None = None) -> Plan:
    """What a full microbatch takes, in the second step, when the moments exist.

    Args:
        config: of the run; its rows are not read, and half of the tokens are taken as labelled.
        dtype: that matmuls run in; None: what `model.dtype` says, where `auto` means bf16.

    Raises:
        UserError: there is no such model, or it has too few positions.
        ValueError: it knows none of these attentions.
    """
    check_positions(config.model, config.data.max_length)
    dtype = dtype or DTYPES.get(config.model.dtype, torch.bfloat16)
    batch = full_batch(config.training.batch_size, config.data.max_length, True, labelled=0.5)
    # In the order of `set_attention`. The kernel takes half precision only.
    if config.data.packing and dtype != torch.float32:
        with suppress(ValueError):  # dropout in attention, or a cap on its scores
            return walk(config, dtype, batch, "varlen_kernel", CHUNK)
    with suppress(ValueError):
        return walk(config, dtype, batch, "sdpa", CHUNK)
    return walk(config, dtype, batch, "eager", CHUNK)


def walk(
    config: Config, dtype: torch.dtype, batch: dict[str, Any], attention: str, chunk: int
) -> Plan:
    """Walk two steps of one batch, with an attention and a chunk of logits that are given."""
    model: Any = _shapes(config, dtype).train()
    model.set_attn_implementation(attention)
    mode, tracker = FakeTensorMode(allow_non_fake_inputs=True), Tracker()
    batch = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with mode, without_input_casts(model):
        held = _fake(model)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        head = head_of(base)
        plain = PlainHead(base.base_model, head, chunk) if type(head) is nn.Linear else None
        objective, eight = Objective(model, plain), config.training.optimizer == EIGHT
        optimizer = _Still(model) if eight else make_optimizer(model, config.training)
        window = [batch] * min(config.training.gradient_accumulation_steps, 2)
        with tracker:
            for tensor in held:
                tracker.count(tensor)
            weights = tracker.now
            for _ in range(2):
                tracker.peak = tracker.now
                train_step(
                    objective, window, optimizer, None, CPU, dtype=dtype,
                    max_grad_norm=config.training.max_grad_norm,
                )  # fmt: skip
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    moments = sum(state.nbytes for state in states)
    rest = tracker.peak - weights - trained - moments
    if eight:
        moments = sum(p.numel() for p in model.parameters() if p.requires_grad) * MOMENTS[EIGHT]
    return Plan(*(size / GIB for size in (weights, trained, moments, rest)))


def largest_batch(config: Config, gib: float) -> int:
    """The largest `training.batch_size` that fits, up to MOST_ROWS; 0 if none does.

    Memory grows nearly in a line: the next guess is where the last two points meet the limit.
    """
    known: dict[int, float] = {0: 0.0}
    size, low = 1, 0
    while size not in known:
        known[size] = plan(changed(config, f"training.batch_size={size}")).peak_gib
        low = max(n for n, peak in known.items() if peak <= gib)
        high = min((n for n, peak in known.items() if peak > gib), default=MOST_ROWS + 1)
        # Between the last that fits and the first that does not, or beyond the last two that fit.
        one, two = (low, high) if high in known else sorted(known)[-2:]
        slope = (known[two] - known[one]) / (two - one)
        size = min(max(low + int((gib - known[low]) / slope), low + 1), high - 1)
    return low


def cheapest_that_fits(config: Config, gib: float) -> tuple[str, float] | None:
    """The changes that cost the least and bring the peak below so many GiB, as planned with them.

    Returns:
        The keys, for a command line, and the peak then in GiB; None if nothing fits.
    """

    def peak(keys: list[str]) -> float:
        return plan(changed(config, " ".join(keys))).peak_gib

    for key, _ in next_settings(config):  # one of them alone
        if (then := peak([key])) <= gib:
            return key, then
    keys: list[str] = []
    while (then := peak(keys)) > gib:  # or several, in their order
        if not (more := next_settings(changed(config, " ".join(keys)))):
            return None
        keys.append(more[0][0])
    last = dict(key.split("=", 1) for key in " ".join(keys).split())
    return " ".join(f"{key}={value}" for key, value in last.items()), then


@dataclass
class Cost:
    """What a whole run takes of one GPU."""

    steps: int
    tokens: int  # real ones, each as often as it is trained on
    flops: float  # that the model needs for them, recomputing left out

    def hours(self, flops_a_second: float, share: float) -> float:
        """On a GPU with this peak, of which a share is used."""
        return self.flops / (flops_a_second * share) / 3600


def cost(config: Config, data: TokenDataset) -> Cost:
    """Count a run's steps, tokens and model FLOPs on one GPU from its rows."""
    settings = config.training
    sampler = TokenBudgetSampler(
        data.lengths, config.data.max_length, settings.batch_size, config.data.packing,
        config.seed, shuffle=True,
    )  # fmt: skip
    steps = count_steps(settings, len(sampler))
    epochs = steps * settings.gradient_accumulation_steps / len(sampler)
    per_token, per_label = count_flops(_shapes(config, torch.bfloat16), data.lengths)
    tokens, labelled = int(data.lengths.sum()), data.facts.labelled_tokens
    return Cost(steps, int(epochs * tokens), epochs * (per_token * tokens + per_label * labelled))


class _Still(torch.optim.Optimizer):
    """Takes no step: 8-bit AdamW asks the host, and its moments are counted by their formula."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__((p for p in model.parameters() if p.requires_grad), {"lr": 0.0})
        self.defaults["fused"] = True  # so that nobody asks the host on its behalf

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""


def _shapes(config: Config, dtype: torch.dtype) -> nn.Module:
    """The model as it would be loaded, without weights."""
    wanted = config.model
    kept = dtype_of_trained(config.training, dtype) if config.lora is None else dtype
    model = without_weights(wanted, kept)
    if wanted.quantization != "none":
        _quantize(model, wanted.quantization, dtype)
    if config.lora is not None:
        model = add_adapters(model, config.lora.model_copy(update={"adapter": None}))
    if wanted.gradient_checkpointing is True:
        checkpoint_layers(model, wanted)
    return model


def _quantize(model: Any, kind: str, dtype: torch.dtype) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    settings = BitsAndBytesConfig(
        **{f"load_in_{kind}": True},
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    replace_with_bnb_linear(model, ["lm_head"], quantization_config=settings)
    setattr(model, f"is_loaded_in_{kind}", True)


def _fake(model: nn.Module) -> list[Tensor]:
    """Replace every tensor by a fake one; ties stay ties. Returns them all, once each."""
    fakes: dict[Tensor, Tensor] = {}  # by the real ones, which hash by identity
    parts: list[Tensor] = []

    def fake(real: Tensor, module: nn.Module, name: str) -> Tensor:
        if real in fakes:
            return fakes[real]
        if type(module).__name__ == "Linear4bit" and name == "weight":
            new = _packed(module, parts)
        else:
            new = torch.empty(real.shape, dtype=real.dtype, device=CPU)
            new = nn.Parameter(new, real.requires_grad) if isinstance(real, nn.Parameter) else new
        fakes[real] = new
        return new

    for module in model.modules():
        tables: Any = (module._parameters, module._buffers)
        for table in tables:
            for name, real in list(table.items()):
                if real is not None:
                    table[name] = fake(real, module, name)
    return [*fakes.values(), *parts]


def _packed(layer: Any, parts: list[Tensor]) -> Tensor:
    """A 4-bit weight: half a byte each, a byte for 64 of them, four bytes for 256 of those."""
    from bitsandbytes.functional import QuantState

    count = layer.in_features * layer.out_features
    blocks = -(-count // 64)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // 256)), blocksize=256, code=torch.empty(256),
        dtype=torch.float32,
    )  # fmt: skip
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)), code=torch.empty(16),
        blocksize=64, quant_type="nf4", dtype=layer.compute_dtype, offset=torch.empty(()),
        state2=nested,
    )  # fmt: skip
    parts += (state.absmax, nested.absmax)
    weight: Any = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), False)
    weight.quant_state = layer.quant_state = state
    layer.support_avx512bf16_for_cpu = False
    return weight
