"""The loop computes what it says: proofs on a tiny model, in fp32, on a CPU."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from conftest import packed, padded
from src.data import IGNORE
from src.training.trainer import (
    StepResult,
    as_objective,
    evaluate,
    perplexity,
    train_epoch,
    train_step,
    training_steps,
)
from src.utils.errors import RunError

CPU = torch.device("cpu")


def take_step(model, window: list[dict], optimizer, clip: float | None = None) -> StepResult:
    objective = as_objective(model, torch.float32)
    return train_step(objective, window, optimizer, None, CPU, max_grad_norm=clip)


def gradients(model, window: list[dict]) -> torch.Tensor:
    """The gradient that train_step hands to the optimizer, as one vector."""
    model = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    take_step(model, window, torch.optim.SGD(trained, lr=1.0))
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trained, strict=True)])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("lora", [False, True])
def test_accumulating_microbatches_equals_one_big_batch(make_model, data, lora: bool) -> None:
    # In double precision: 1e-6 then is far above rounding and far below any wrong weighting.
    model = make_model(lora=lora, packing=False).double()
    if lora:  # B starts at zero, and with it A's gradient
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    whole = gradients(model, [padded(data, [0, 1, 2, 3, 4, 5])])
    parts = gradients(model, [padded(data, [0]), padded(data, [1, 2]), padded(data, [3, 4, 5])])
    assert relative(parts, whole) < 1e-6
    assert relative(gradients(model.float(), [padded(data, [0])]), whole.float()) > 0.1


def test_packed_and_padded_training_give_the_same_gradient(make_model, data) -> None:
    everything = list(range(8))
    in_rows = gradients(make_model(packing=False), [padded(data, everything)])
    in_one = gradients(make_model(), [packed(data, everything, budget=512)])
    assert relative(in_one, in_rows) < 1e-5


def test_evaluation_of_packed_rows_equals_documents_one_by_one(make_model, data) -> None:
    batches = [packed(data, [0, 1, 2]), packed(data, [3, 4, 5, 6])]
    found = evaluate(make_model(), batches, CPU, torch.float32)
    model, total, count = make_model(packing=False), 0.0, 0
    for _, ids, labels in data[list(range(7))]:
        logits = model(torch.tensor(ids)[None].long()).logits[0, :-1]
        target = torch.tensor(labels)[1:].long()
        total += F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORE).item()
        count += int((target != IGNORE).sum())
    assert found == pytest.approx(total / count, rel=1e-5)
    assert perplexity(found) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_window_without_labels_changes_nothing_and_is_no_nan(make_model, data) -> None:
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    result = take_step(model, [packed(data, [])], optimizer, 1.0)
    assert (result.labelled, result.loss.item()) == (0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_windows_without_labels_do_not_stop_an_fp16_scaler(make_model, data) -> None:
    model, scaler = make_model(packing=False), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [padded(data, []), padded(data, []), padded(data, [1])]
    assert train_epoch(model, loader, optimizer, scaler, CPU, dtype=torch.float16) > 0


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_is_not_taken(make_model, data, fused: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    good = [packed(data, [n]) for n in range(3)]
    train_epoch(model, good, optimizer, None, CPU, dtype=torch.float32)
    before = [p.clone() for p in model.parameters()]
    model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RunError, match="not finite"):
        train_epoch(model, good, optimizer, None, CPU, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    states = [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.isfinite(v).all() for v in states)


def test_twenty_losses_equal_those_of_the_transformers_trainer(make_model, data, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    batches = [padded(data, [n % 12, (5 * n + 1) % 12]) for n in range(40)]
    # The same shapes for both: what Trainer's collator stacks.
    rows = [{k: b[k] for k in ("input_ids", "labels")} for b in batches]
    model = make_model(packing=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    options = {"accumulation": 2, "dtype": torch.float32}
    steps = training_steps(model, batches, optimizer, None, CPU, **options)
    ours = [step.loss.item() for step in steps]

    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        optim="adamw_torch_fused", max_grad_norm=1.0, use_cpu=True, save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(
        make_model(packing=False),
        arguments,
        train_dataset=rows,
        data_collator=lambda items: items[0],
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_train_epoch_takes_plain_batches_and_learns(make_model, data) -> None:
    model = make_model(packing=False)
    rows = [{k: padded(data, [n])[k][0] for k in ("input_ids", "labels")} for n in range(12)]
    loader = DataLoader(rows, batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [train_epoch(model, loader, optimizer, None, "cpu") for _ in range(2)]
    assert losses[1] < 0.8 * losses[0], losses


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 2.0**11), (torch.bfloat16, 1.0)])
def test_fp16_uses_the_scaler_and_bf16_does_not(make_model, data, dtype, scale: float) -> None:
    model, fp16 = make_model(packing=False), dtype == torch.float16
    scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=2.0**10, growth_interval=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    before = model.lm_head.weight.clone()
    train_epoch(model, [padded(data, [0, 1])], optimizer, scaler, CPU, dtype=dtype)
    assert scaler.get_scale() == scale
    assert not torch.equal(before, model.lm_head.weight)


def test_a_step_is_taken_when_its_result_is_asked_for(make_model, data) -> None:
    model, weights = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [packed(data, [n]) for n in range(5)]
    options = {"accumulation": 2, "dtype": torch.float32}
    steps = training_steps(model, batches, optimizer, None, CPU, **options)
    for step, rows in zip(steps, [[0, 1], [2, 3], [4]], strict=True):  # the last takes what is left
        assert step.documents == rows
        assert not any(torch.equal(model.lm_head.weight, before) for before in weights)
        weights.append(model.lm_head.weight.detach().clone())
