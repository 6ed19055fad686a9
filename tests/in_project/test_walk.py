"""A training step walked as a GPU would take it, on tensors without data.

Fake tensors know dtype and device and have no values: an operator that mixes what does not go
together fails, and so does whatever reads a value back, for which a GPU would be waited for.
On fake CPU tensors a whole step runs, the variable-length kernel and autocast included; on fake
CUDA tensors the forward pass runs, and without a GPU neither autocast nor `backward` does.
`pytest -m gpu` shows what is left: that the kernels themselves agree.
"""

from functools import partial

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from conftest import packed
from src.config import TrainingConfig
from src.data.batching import MODEL_INPUTS, to_device
from src.models.adapters import stop_input_casts
from src.models.attention import attend_by_kernel, varlen_attention
from src.models.head import find_plain_head
from src.training.loss import summed_loss
from src.training.optimizer import make_optimizer
from src.training.trainer import as_objective, train_step
from src.utils.device import autocast

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = {"full": {}, "lora": {"lora": True}, "4bit": {"lora": True, "quantization": "4bit"}}
MATMULS = {"mm", "addmm", "bmm", "baddbmm", "_varlen_attn", "linear"}


def without_data(model, mode: FakeTensorMode, device: torch.device) -> None:
    """Replace every tensor of a model by a fake one of its shape and dtype."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(real: torch.Tensor) -> torch.Tensor:
        if id(real) not in fakes:
            made = torch.empty(real.shape, dtype=real.dtype, device=device)
            if isinstance(real, torch.nn.Parameter):
                made = torch.nn.Parameter(made, real.requires_grad)
            if (state := getattr(real, "quant_state", None)) is not None:
                made.quant_state = state
                fake_state(state)
            fakes[id(real)] = made
        return fakes[id(real)]

    def fake_state(state) -> None:
        for name in ("absmax", "code", "offset"):
            if isinstance(value := getattr(state, name, None), torch.Tensor):
                setattr(state, name, fake(value))
        if state.state2 is not None:
            fake_state(state.state2)

    with mode:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                table.update({k: fake(v) for k, v in table.items() if v is not None})
            if hasattr(module, "quant_state"):
                module.quant_state = module.weight.quant_state


class Watch(TorchDispatchMode):
    """Remembers the dtypes that matrix products take, and the devices of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied: set[torch.dtype] = set()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.ndim >= 2]
        if func.__name__.partition(".")[0] in MATMULS:
            self.multiplied |= {x.dtype for x in tensors}
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.ndim > 0]
        self.devices |= {x.device.type for x in made}
        return out


def use_attention(model, kernel) -> None:
    """Let the model attend by this kernel on any device."""
    AttentionInterface.register("kernel", partial(varlen_attention, kernel=kernel))
    model.set_attn_implementation("kernel")


def fake_batch(data, mode: FakeTensorMode) -> dict:
    batch = packed(data, [0, 1, 2, 3])
    return {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}


def walk(make_model, data, dtype: torch.dtype, **options) -> Watch:
    """Walk a step (fp16: a microbatch, as its scaler asks the host by design) on the CPU."""
    model, mode, watch = make_model(dtype=dtype, **options).train(), FakeTensorMode(), Watch()
    objective = as_objective(model, dtype)
    assert objective.head is not None
    batch = fake_batch(data, mode)
    use_attention(model, attend_by_kernel)
    without_data(model, mode, CPU)
    optimizer = make_optimizer(model, TrainingConfig())
    with mode, watch:
        if dtype == torch.float16:
            objective(to_device(batch, CPU)).backward()
        else:
            train_step(objective, [batch, batch], optimizer, None, CPU, max_grad_norm=1.0)
    return watch


@pytest.mark.parametrize(
    ("kind", "dtype", "checkpointing"),
    [
        ("full", torch.bfloat16, False),
        ("full", torch.bfloat16, True),
        ("lora", torch.bfloat16, False),
        ("4bit", torch.bfloat16, True),
        ("lora", torch.float16, True),
    ],
)
def test_a_step_reads_no_value_and_multiplies_in_half_precision(
    make_model, data, kind: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    watch = walk(make_model, data, dtype, gradient_checkpointing=checkpointing, **KINDS[kind])
    assert watch.multiplied == {dtype}


def test_reading_a_value_within_a_step_is_noticed(make_model, data, monkeypatch) -> None:
    model = make_model()
    model.model.norm.register_forward_hook(lambda *_: float(_[2].sum()) and None)
    with pytest.raises(DataDependentOutputException):
        walk(lambda **_: model, data, torch.bfloat16)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_everything_that_a_forward_pass_makes_is_on_the_gpu(make_model, data, kind: str) -> None:
    model = make_model(dtype=torch.bfloat16, **KINDS[kind])
    # In half precision throughout, since autocast switches itself off where there is no GPU.
    watch = forward_on_gpu(model.bfloat16(), data)
    assert watch.devices == {"cuda"}


def test_a_tensor_left_on_the_cpu_is_noticed(make_model, data) -> None:
    model = make_model().bfloat16()
    mask = torch.ones(model.config.hidden_size, dtype=torch.bfloat16)
    model.model.norm.register_forward_hook(lambda _, __, hidden: hidden * mask)
    with pytest.raises(Exception, match="device"):
        forward_on_gpu(model, data)


def forward_on_gpu(model, data) -> Watch:
    """The loss of a microbatch on fake CUDA tensors; attention's kernel would ask for a driver."""
    mode, watch = FakeTensorMode(allow_non_fake_inputs=True), Watch()
    head = find_plain_head(model, torch.float32)

    def stand_in(q, _, v, bounds, *__):
        return q.transpose(1, 2) + v[:, :1, :1, :1] + bounds[:1]  # fails on two devices

    use_attention(model, stand_in)
    without_data(model, mode, GPU)
    batch = fake_batch(data, mode)
    with mode, torch.no_grad(), watch:
        summed_loss(model, to_device(batch, GPU), head)
    return watch


@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_layer_is_one_graph_on_the_gpus_way(make_model, data, lora: bool) -> None:
    traced: list[int] = []

    class Traced(Exception):
        pass

    def backend(graph, _):
        traced.append(len(graph.graph.nodes))
        raise Traced  # a CPU could not run the kernel in it

    model = make_model(lora=lora).train()
    base = model.get_base_model() if lora else model
    base.model.layers[0].compile(fullgraph=True, backend=backend)
    batch = packed(data, [0, 1, 2])
    inputs = {k: batch[k] for k in MODEL_INPUTS if k in batch}
    refused = pytest.raises(BackendCompilerFailed, match="Traced")  # a graph break raises another
    use_attention(model, attend_by_kernel)
    stop_input_casts(model)
    with autocast(CPU, torch.bfloat16), refused:
        model(**inputs, use_cache=False)
    assert len(traced) == 1
