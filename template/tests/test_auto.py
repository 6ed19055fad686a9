"""What `auto` settles: compiling pays or falls back, memory decides how many layers recompute."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, LlamaForCausalLM

from conftest import packed, padded
from src.config import Config, DataConfig, ModelConfig, TrainingConfig
from src.data.batching import full_batch
from src.models.attention import varlen_attention
from src.models.model import compile_layers, decoder_layers, recompute_first
from src.training import auto
from src.training.auto import Trial, choose_layers, settle, try_microbatches, worth_compiling
from src.training.checkpoint import Training
from src.training.loss import Objective, chunk_gradient, find_plain_head
from src.training.optimizer import make_optimizer
from src.training.trainer import evaluate, train_epoch, training_steps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def objective_of(model) -> Objective:
    return Objective(model, find_plain_head(model, CPU, torch.float32))


def training_of(model) -> Training:
    settings = TrainingConfig(learning_rate=1e-2)
    return Training(model, make_optimizer(model, settings), torch.amp.GradScaler("cpu"), {})


def config_of(**model: object) -> Config:
    return Config(
        output_dir="unused", model=ModelConfig(name="unused", **model),
        data=DataConfig(train="unused", max_length=64), training=TrainingConfig(batch_size=2),
    )  # fmt: skip


def losses(objective, data, epochs: int = 2) -> list[float]:
    """Train on packed rows of few documents and of many."""
    training, found = training_of(objective.model), []
    rows = [packed(data, some, budget=512) for some in ([0, 1, 2, 3], [4], [0] * 18)]
    assert len({len(row["cu_seq_lens_q"]) for row in rows}) > 1
    for _ in range(epochs):
        steps = training_steps(objective, rows, training.optimizer, None, CPU, dtype=torch.float32)
        found += [float(step.loss) for step in steps]
    return found


class Card:
    """A GPU's memory: a layer that is not recomputed keeps `each` GiB, the rest takes `other`."""

    def __init__(self, size: float, layers: int, each: float, other: float) -> None:
        self.size, self.layers, self.each, self.other = size, layers, each, other
        self.tried: list[int] = []

    def recompute(self, count: int) -> None:
        self.count = count

    def attempt(self) -> Trial:
        self.tried.append(self.count)
        held = 1 + (self.layers - self.count) * self.each
        if held + self.other > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Trial(held, held + self.other, 0.5)


@pytest.mark.parametrize("size", [2.9, 5.1, 9.0, 17.3, 30.0, 100.0])
def test_no_more_layers_are_recomputed_than_memory_needs(size: float) -> None:
    card = Card(size, layers=32, each=1.1, other=1.5)
    count, peak = choose_layers(card.attempt, card.recompute, 32, 0.95 * size)
    fewest = next((n for n in range(33) if 1 + (32 - n) * 1.1 + 1.5 <= 0.95 * size), 32)
    assert count == card.count == fewest
    assert peak == pytest.approx(1 + (32 - count) * 1.1 + 1.5)
    assert len(card.tried) <= 5


def test_the_first_estimate_is_refined_where_it_was_careful() -> None:
    card = Card(20.0, layers=32, each=1.0, other=1.5)
    true = card.attempt

    def attempt() -> Trial:  # while every layer is recomputed, the peak is that of recomputing one
        trial = true()
        return Trial(trial.held, trial.peak + 4 * (card.count == 32), 0.5)

    assert choose_layers(attempt, card.recompute, 32, 19.0)[0] == 32 - 16


def test_a_wrong_estimate_ends_in_more_recomputed_layers_and_no_error() -> None:
    card = Card(20.0, layers=32, each=1.0, other=1.5)

    def attempt() -> Trial:  # most layers keep more than the last two, by which it is estimated
        trial = card.attempt()
        few = 32 - card.count <= 2
        return Trial(trial.held / 2, trial.peak, 0.5) if few else trial

    count, peak = choose_layers(attempt, card.recompute, 32, 19.0)
    assert peak <= 19.0
    assert card.count == count < 32


def test_where_only_recomputed_layers_fit_all_are() -> None:
    card = Card(2.7, layers=8, each=1.0, other=1.5)
    assert choose_layers(card.attempt, card.recompute, 8, 2.6) == (8, 2.5)
    assert card.count == 8
    small = Card(2.0, layers=8, each=1.0, other=1.5)
    with pytest.raises(torch.OutOfMemoryError):  # nothing fits: training.out_of_memory explains it
        choose_layers(small.attempt, small.recompute, 8, 1.9)


@pytest.mark.parametrize(("seconds", "worth"), [(30, False), (100, False), (200, True)])
def test_a_run_is_compiled_if_it_earns_the_compile_time_back(seconds, worth, capsys) -> None:
    assert worth_compiling(seconds) == worth
    assert capsys.readouterr().out.startswith(f"compile    {'yes' if worth else 'no'}: ")


@pytest.fixture
def on_a_gpu(make_model, monkeypatch):
    """Settle as on a GPU of so many GiB: which layers are recomputed, and what is compiled."""

    def run(gib, packing=True, seconds=1.0, deterministic=False, **model: object):
        built = make_model()
        layers, compiled = len(decoder_layers(built)), []

        def try_it(*_: object) -> Trial:
            kept = sum(not layer.gradient_checkpointing for layer in decoder_layers(built))
            held = 1.0 + kept * (1.0 if compiled else 2.0)
            if held + 1 > gib:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return Trial(held, held + 1, seconds)

        monkeypatch.setattr(auto, "try_microbatches", try_it)
        monkeypatch.setattr(auto, "memory_limit", lambda _: gib)
        monkeypatch.setattr(auto, "to_device", lambda batch, _: batch)
        monkeypatch.setattr(auto, "compile_layers", lambda _: compiled.append(True))
        training = SimpleNamespace(model=built, trained=dict, moments=list)
        monkeypatch.setattr(type(built), "device", torch.device("cuda"))
        config = config_of(**model).model_copy(update={"deterministic": deterministic})
        settle(config, Objective(built), training, packing, 1000, torch.bfloat16)
        kept = sum(not layer.gradient_checkpointing for layer in decoder_layers(built))
        return layers - kept, bool(compiled)

    return run


def test_auto_recomputes_nothing_on_a_card_with_room_and_compiles_a_long_run(on_a_gpu) -> None:
    assert on_a_gpu(100) == (0, True)
    assert on_a_gpu(100, seconds=0.01) == (0, False), "a run of ten seconds"
    assert on_a_gpu(100, packing=False) == (0, False), "padded rows have many shapes"
    assert on_a_gpu(100, deterministic=True) == (0, False), "a resumed run might decide otherwise"


def test_auto_leaves_alone_what_cannot_be_recomputed_or_was_never_compiled(
    on_a_gpu, monkeypatch
) -> None:
    assert on_a_gpu(100, quantization="8bit") == (0, False)
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert on_a_gpu(100) == (0, True), "and no error, as the config did not ask for it"


def test_compiled_layers_need_less_memory_so_fewer_of_them_are_recomputed(on_a_gpu) -> None:
    assert on_a_gpu(5.5, compile=False) == (3, False)
    assert on_a_gpu(5.5) == (1, True)


def test_what_the_config_says_is_done(on_a_gpu) -> None:
    assert on_a_gpu(100, compile=True, gradient_checkpointing="auto", packing=False) == (0, True)
    assert on_a_gpu(100, compile=False) == (0, False)
    assert on_a_gpu(3, compile=False, gradient_checkpointing=False) == (0, False)


def test_on_a_cpu_auto_compiles_and_recomputes_nothing(make_model, monkeypatch) -> None:
    monkeypatch.setattr(auto, "try_microbatches", lambda *_: pytest.fail("nothing to try"))
    model = make_model()
    settle(config_of(), objective_of(model), training_of(model), True, 1000, torch.float32)
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(model))


@pytest.mark.parametrize("lora", [False, True])
def test_any_number_of_recomputed_layers_gives_the_same_losses(make_model, data, lora) -> None:
    expected = losses(objective_of(make_model(lora)), data)
    for count in (1, 4):
        model = make_model(lora, gradient_checkpointing=True)
        recompute_first(model, count)
        assert losses(objective_of(model), data) == expected


def test_trying_changes_neither_weights_nor_random_numbers(make_model) -> None:
    for packing in (True, False):
        model = make_model(lora=True, packing=packing)
        training, objective = training_of(model), objective_of(model)
        weights = {name: p.detach().clone() for name, p in training.trained().items()}
        layer = decoder_layers(model)[0]
        layer.register_forward_hook(lambda *_: torch.rand(1) and None)  # as dropout would draw
        batch = full_batch(2, 64, packing)
        assert batch["labelled"] == 2 * 63, "all that a row can have"
        before = torch.get_rng_state()
        trial = try_microbatches(objective, training, [batch] * 2, torch.float32)
        assert trial.seconds > 0
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(weights[name], p) for name, p in training.trained().items())
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
    evaluate(
        objective, [packed(data, [0, 1], 512), packed(data, [0] * 18, 512)], CPU, torch.float32
    )
    evaluated = counter.frame_count
    losses(objective, data)
    evaluate(objective, [packed(data, [3, 4, 5], 512)], CPU, torch.float32)
    assert counter.frame_count == evaluated <= trained + 2


def test_padded_rows_of_other_lengths_are_compiled_a_few_times_only(make_model, data) -> None:
    model, counter = make_model(packing=False), CompileCounterWithBackend("eager")
    compile_layers(model, counter)
    training = training_of(model)
    rows = [padded(data, list(range(n))) for n in range(1, 12)]
    train_epoch(objective_of(model), rows, training.optimizer, None, CPU, dtype=torch.float32)
    assert counter.frame_count <= 4


def broken(*_: object) -> None:
    raise RuntimeError("no C compiler\nand a long story")


@pytest.mark.parametrize(
    "backend", [broken, aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=broken)]
)
def test_where_compiling_fails_training_goes_on_eagerly_after_one_line(
    make_model, data, monkeypatch, capsys, backend
) -> None:
    expected = losses(objective_of(make_model(lora=True)), data)
    monkeypatch.setattr(auto, "compile_layers", partial(compile_layers, backend=backend))
    model = make_model(lora=True)
    objective = objective_of(model)
    settle(config_of(compile=True), objective, training_of(model), True, 9, torch.float32)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("compile    failed, so nothing is compiled: ")
    assert "no C compiler" in line
    assert "long story" not in line
    assert losses(objective, data) == pytest.approx(expected, rel=1e-6)


def test_the_losss_gradient_is_the_same_where_it_is_compiled() -> None:
    logits, target = torch.randn(6, 50), torch.tensor([3, 0, -100, 49, 7, -100])
    expected = chunk_gradient(logits, target)
    real = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(real, target, reduction="sum")
    loss.backward()
    compiled = torch.compile(chunk_gradient, backend="eager")(logits, target)
    for found in (expected, compiled):
        torch.testing.assert_close(found, (loss.detach(), real.grad))
