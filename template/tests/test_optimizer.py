"""The learning rate follows from the configuration and the step; decay is for matrices."""

import pytest
import torch

from src.config import TrainingConfig
from src.training.optimizer import (
    count_steps,
    dtype_of_trained,
    make_optimizer,
    make_scheduler,
)


def rates(settings: TrainingConfig, done: int, steps: int = 12) -> list[float]:
    """The learning rates of the steps after the first `done`."""
    optimizer = make_optimizer(torch.nn.Linear(2, 2), settings)
    scheduler, found = make_scheduler(optimizer, settings, steps, done), []
    for _ in range(done, steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1.0, *[1.0] * 10]),
        ("linear", [0.5, 1.0, *(1 - n / 10 for n in range(10))]),
        ("cosine", [0.5, 1.0, 1.0, 0.97553, 0.90451, 0.79389, 0.65451, 0.5, 0.34549, 0.20611, 0.09549, 0.02447]),
    ],
)  # fmt: skip
def test_a_resumed_schedule_goes_on_as_one_that_was_never_stopped(name: str, expected) -> None:
    settings = TrainingConfig(scheduler=name, warmup_steps=2, learning_rate=1.0)
    straight = rates(settings, 0)
    assert straight == pytest.approx(expected, abs=1e-5)
    for done in (1, 2, 7, 12):
        assert rates(settings, done) == straight[done:]


def test_weight_decay_pulls_matrices_only_and_frozen_weights_not_at_all(make_model) -> None:
    model = make_model()
    model.get_input_embeddings().requires_grad_(False)
    decayed, rest = make_optimizer(model, TrainingConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(rest["params"]) == trained


def test_steps_are_counted_with_the_last_window_of_each_epoch() -> None:
    settings = TrainingConfig(gradient_accumulation_steps=4, epochs=3)
    assert count_steps(settings, batches=9) == 9
    limited = TrainingConfig(gradient_accumulation_steps=4, epochs=3, max_steps=5)
    assert count_steps(limited, batches=9) == 5


def test_8bit_adamw_moves_bf16_weights_by_less_than_bf16_can_tell_apart() -> None:
    # 100 updates of 2e-6 on weights of 0.02, next to which bf16 knows only steps of 6e-5 and more:
    # rounded to the nearest, none of them would leave a trace.
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(layer.weight, 0.02)
    start = layer.weight.detach().float().mean()
    optimizer = make_optimizer(layer, TrainingConfig(optimizer="adamw8bit", learning_rate=2e-6))
    with torch.compiler.set_stance("force_eager"):
        for _ in range(100):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
    assert (layer.weight.float().mean() - start).item() == pytest.approx(-2e-4, rel=0.1)


def test_weights_are_kept_in_bf16_only_where_they_are_rounded_stochastically() -> None:
    half, whole = TrainingConfig(optimizer="adamw8bit"), TrainingConfig()
    assert dtype_of_trained(half, torch.bfloat16) == torch.bfloat16
    for settings, dtype in ((half, torch.float16), (half, torch.float32), (whole, torch.bfloat16)):
        assert dtype_of_trained(settings, dtype) == torch.float32
