"""What `auto` decides: compiling pays off or falls back; as many layers recompute as must."""

import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from conftest import ROOT, packed, padded
from src.config import Config, DataConfig, ModelConfig, TrainingConfig
from src.data.batching import full_batch
from src.models.attention import varlen_attention
from src.models.model import compile_layers, decoder_layers, recompute_first
from src.training import auto
from src.training.auto import Trial, choose_layers, prepare_layers, try_microbatches
from src.training.checkpoint import TrainState
from src.training.loss import Objective, chunk_loss_and_grad
from src.training.optimizer import make_optimizer
from src.training.trainer import as_objective, evaluate, train_epoch, training_steps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def objective_of(model) -> nn.Module:
    return as_objective(model, torch.float32)


def optimizer_of(model) -> torch.optim.Optimizer:
    return make_optimizer(model, TrainingConfig(learning_rate=1e-2))


def run_of(objective, packing=True, deterministic=False, **model: object) -> Any:
    """What settling the layers reads of a run."""
    config = Config(
        output_dir="unused", model=ModelConfig(name="unused", **model), deterministic=deterministic,
        data=DataConfig(train="unused", max_length=64), training=TrainingConfig(batch_size=2),
    )  # fmt: skip
    return SimpleNamespace(
        config=config, objective=objective, model=objective.model, state=TrainState(),
        optimizer=optimizer_of(objective.model), train_loader=SimpleNamespace(packing=packing),
        total_steps=1000,
    )  # fmt: skip


def losses(objective, data) -> list[float]:
    """Train on packed rows of few documents and of many."""
    optimizer = optimizer_of(objective.model)
    rows = [packed(data, some, budget=512) for some in ([0, 1, 2, 3], [4], [0] * 18)]
    assert len({len(row["cu_seq_lens_q"]) for row in rows}) > 1
    steps = training_steps(objective, rows, optimizer, None, CPU, dtype=torch.float32)
    return [float(step.loss) for step in steps]


@pytest.mark.parametrize("size", [2.9, 5.1, 9.0, 17.3, 20.0, 30.0, 100.0])
@pytest.mark.parametrize(
    ("first", "last", "recomputing"),
    [(1.1, 1.1, 0.0), (1.0, 1.0, 4.0), (2.0, 1.0, 0.0), (0.5, 1.0, 0.0)],
)
def test_no_more_layers_are_recomputed_than_memory_needs(
    size: float, first: float, last: float, recomputing: float
) -> None:
    tried: list[int] = []

    def held(count: int) -> float:  # with `count` of 32 layers recomputed
        return 1.0 + sum(first if layer < 30 else last for layer in range(count, 32))

    def peak(count: int) -> float:  # recomputing one layer may be the peak where all are
        return held(count) + 1.5 + recomputing * (count == 32)

    def attempt() -> Trial:
        if peak(tried[-1]) > size:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Trial(held(tried[-1]), peak(tried[-1]), 0.5)

    if peak(32) > size:
        with pytest.raises(torch.OutOfMemoryError):
            choose_layers(attempt, tried.append, 32, 0.95 * size)
        return
    count, gib = choose_layers(attempt, tried.append, 32, 0.95 * size)
    fewest = next((n for n in range(33) if peak(n) <= 0.95 * size), 32)
    # The last layers are measured first: the estimate is less exact if the others differ.
    assert fewest <= count <= fewest + 2 * (first != last)
    assert (count, gib) == (tried[-1], pytest.approx(peak(count)))
    assert len(tried) <= (6 if first == last else 8)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Settle as on a GPU of so many GiB: how many layers are recomputed, and are they compiled."""

    def settle(gib: float, packing=True, seconds=1.0, deterministic=False, **model: object):
        config = AutoConfig.from_pretrained(ROOT / "configs/tiny", num_hidden_layers=4)
        built = AutoModelForCausalLM.from_config(config)
        layers, compiled = decoder_layers(built), []

        def kept() -> int:
            return sum(not layer.gradient_checkpointing for layer in layers)

        def attempt(*_: object) -> Trial:
            held = 1.0 + kept() * (1.0 if compiled else 2.0)
            if held + 1 > gib:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return Trial(held, held + 1, seconds)

        monkeypatch.setattr(auto, "try_microbatches", attempt)
        monkeypatch.setattr(auto, "memory_limit", lambda _: gib)
        monkeypatch.setattr(auto, "to_device", lambda batch, _: batch)
        monkeypatch.setattr(auto, "compile_layers", lambda _: compiled.append(True))
        run = run_of(Objective(built, torch.bfloat16), packing, deterministic, **model)
        run.optimizer = SimpleNamespace(state={"a": "moment"})
        monkeypatch.setattr(type(built), "device", torch.device("cuda"))
        prepare_layers(run)
        return len(layers) - kept(), bool(compiled)

    return settle


@pytest.mark.parametrize(
    ("gib", "options", "recomputed", "compiled"),
    [
        (100, {"seconds": 0.01}, 0, False),  # a run of ten seconds
        (100, {"packing": False}, 0, False),  # padded rows have many shapes
        (100, {"deterministic": True}, 0, False),  # a resumed run might decide otherwise
        (100, {"quantization": "8bit"}, 0, False),  # never measured
        (100, {"compile": True, "packing": False}, 0, True),  # as the config says
        (3, {"compile": False, "gradient_checkpointing": False}, 0, False),
        (5.5, {"compile": False}, 3, False),
        (5.5, {}, 1, True),  # compiled layers need less memory
    ],
)
def test_auto_recomputes_as_few_layers_as_fit_and_compiles_what_earns_it_back(
    on_a_gpu, gib: float, options: dict, recomputed: int, compiled: bool
) -> None:
    assert on_a_gpu(gib, **options) == (recomputed, compiled)


def test_what_auto_decides_is_printed_and_what_a_model_cannot_do_is_no_error(
    on_a_gpu, capsys, monkeypatch
):
    assert on_a_gpu(100) == (0, True)
    page = capsys.readouterr().out
    assert "compile    yes: training takes at most 17 min without it, compiling 25 s once" in page
    assert "memory     0 of 4 layers recomputed: at most 10.0 of 100.0 GiB" in page
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert on_a_gpu(100) == (0, True), "and no error, as the config did not ask for it"
    assert "recomputed" not in capsys.readouterr().out


def test_on_a_cpu_auto_compiles_and_recomputes_nothing(make_model, monkeypatch) -> None:
    monkeypatch.setattr(auto, "try_microbatches", lambda *_: pytest.fail("nothing to try"))
    model = make_model()
    prepare_layers(run_of(objective_of(model)))
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(model))


def test_any_number_of_recomputed_layers_gives_the_same_losses(make_model, data) -> None:
    expected = losses(objective_of(make_model(lora=True)), data)
    for count in (1, 2):
        model = make_model(lora=True, gradient_checkpointing=True)
        recompute_first(model, count)
        assert losses(objective_of(model), data) == expected


def test_trying_changes_no_weights_and_leaves_no_gradients(make_model) -> None:
    for packing in (True, False):
        model = make_model(lora=True, packing=packing)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = full_batch(2, 64, packing)
        assert batch["labelled"] == 2 * 63, "all that a row can have"
        trial = try_microbatches(run_of(objective_of(model)), [batch] * 2)
        assert trial.seconds > 0
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_compiled_layers_take_the_same_steps_and_no_shape_is_compiled_twice(
    make_model, data, lora: bool
) -> None:
    def one_operator(q, k, v, bounds, *_):  # as the CUDA kernel is; a CPU's loop breaks graphs
        return (q + v[:, :1, :1, :1] + 0 * bounds.sum()).transpose(1, 2)

    AttentionInterface.register("one_op", partial(varlen_attention, kernel=one_operator))
    objectives = [objective_of(make_model(lora)) for _ in range(2)]
    for each in objectives:
        each.model.set_attn_implementation("one_op")
    expected, objective = losses(objectives[0], data), objectives[1]
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(objective.model, counter)
    assert losses(objective, data) == pytest.approx(expected, rel=1e-5)
    trained = counter.frame_count
    assert trained == 1 + lora, "for any number of documents; the first layer's input is frozen"
    rows = [packed(data, some, 512) for some in ([0, 1], [0] * 18, [3, 4, 5])]
    evaluate(objective, rows[:2], CPU, torch.float32)
    evaluated = counter.frame_count
    losses(objective, data)
    evaluate(objective, rows[2:], CPU, torch.float32)
    assert counter.frame_count == evaluated <= trained + 2


def test_padded_rows_of_other_lengths_are_compiled_a_few_times_only(make_model, data) -> None:
    model, counter = make_model(packing=False), CompileCounterWithBackend("eager")
    compile_layers(model, counter)
    rows = [padded(data, list(range(n))) for n in range(1, 12)]
    train_epoch(objective_of(model), rows, optimizer_of(model), None, CPU, dtype=torch.float32)
    assert counter.frame_count <= 4


def test_where_compiling_fails_training_goes_on_eagerly_after_one_line(
    make_model, data, monkeypatch, capsys
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C compiler\nand a long story")

    expected = losses(objective_of(make_model(lora=True)), data)
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=broken)
    monkeypatch.setattr(auto, "compile_layers", partial(compile_layers, backend=backend))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # of the loss
    objective = objective_of(make_model(lora=True))
    prepare_layers(run_of(objective, compile=True))
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match("compile    failed, so nothing is compiled: .*no C compiler$", line)
    assert losses(objective, data) == pytest.approx(expected, rel=1e-6)


def test_the_losss_gradient_is_the_same_where_it_is_compiled() -> None:
    logits, target = torch.randn(6, 50), torch.tensor([3, 0, -100, 49, 7, -100])
    expected = chunk_loss_and_grad(logits, target)
    real = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(real, target, reduction="sum")
    loss.backward()
    compiled = torch.compile(chunk_loss_and_grad, backend="eager")(logits, target)
    for found in (expected, compiled):
        torch.testing.assert_close(found, (loss.detach(), real.grad))
