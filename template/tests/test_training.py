"""The loop computes what it says: proofs on a tiny model, in fp32, on a CPU."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from conftest import chat
from src.data import IGNORE
from src.data.batching import TokenBudgetSampler, collate_packed, collate_padded, make_loader
from src.data.dataset import load_tokens
from src.training.loss import find_plain_head, label_positions, summed_loss
from src.training.trainer import NonFinite, evaluate, train_epoch, train_step

CPU = torch.device("cpu")


@pytest.fixture
def data(tokenizer, write_rows):
    """Twelve documents of very different lengths and label counts."""
    rows = [chat("why? " * (n % 5), "because " * (1 + n * n % 11)) for n in range(12)]
    return load_tokens(write_rows(*rows), tokenizer, max_length=64)


def packed(data, indices: list[int], budget: int = 256) -> dict:
    return collate_packed(data.documents(indices), budget, 64, pad_id=2)


def padded(data, indices: list[int]) -> dict:
    return collate_padded(data.documents(indices), 64, pad_id=2)


def gradients(model, window: list[dict]) -> torch.Tensor:
    """The gradient that train_step hands to the optimizer, as one vector."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    train_step(
        model, tuple(window), optimizer, None, CPU, None, torch.float32, find_plain_head(model)
    )
    after = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(b - a).flatten() for b, a in zip(before, after, strict=True)]).detach()


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


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_equal_separate_ones(
    make_model, data, attention, mode, checkpointing
) -> None:
    model = make_model(attention=attention, gradient_checkpointing=checkpointing)
    alone = make_model(attention="sdpa", packing=False)
    getattr(model, mode)()
    row = packed(data, [3, 1, 4, 0])
    keys = (
        "input_ids",
        "position_ids",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    )
    logits = model(**{k: row[k] for k in keys}, use_cache=False).logits[0]
    at = 0
    for ids, _ in data.documents([3, 1, 4, 0]):
        expected = alone(torch.tensor(ids)[None].long()).logits[0]
        assert torch.allclose(logits[at : at + len(ids)], expected, atol=1e-5)
        at += len(ids)


def test_packed_and_padded_training_give_the_same_gradient(make_model, data) -> None:
    everything = list(range(8))
    in_rows = gradients(make_model(packing=False), [padded(data, everything)])
    in_one = gradients(make_model(), [packed(data, everything, budget=512)])
    assert relative(in_one, in_rows) < 1e-5


def test_evaluation_of_packed_rows_equals_documents_one_by_one(make_model, data) -> None:
    batches = [packed(data, [0, 1, 2]), packed(data, [3, 4, 5, 6])]
    found = evaluate(make_model(), batches, CPU, torch.float32)
    model, total, count = make_model(packing=False), 0.0, 0
    for ids, labels in data.documents(list(range(7))):
        logits = model(torch.tensor(ids)[None].long()).logits[0, :-1]
        target = torch.from_numpy(labels)[1:].long()
        total += F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORE).item()
        count += int((target != IGNORE).sum())
    assert found.labelled == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("labels", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_loss_equals_the_full_one(monkeypatch, labels: int, bias: bool) -> None:
    import src.training.loss as module

    monkeypatch.setattr(module, "CPU_CHUNK", 64)
    torch.manual_seed(0)
    hidden = torch.randn(400, 16, dtype=torch.float64)
    weight = torch.randn(50, 16, dtype=torch.float64)
    offset = torch.randn(50, dtype=torch.float64) if bias else None
    label = torch.full((1, 401), IGNORE)
    label[0, 1 + torch.randperm(400)[:labels]] = torch.randint(0, 50, (labels,))

    def run(chunked: bool) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, offset) if x is not None]
        h, w = leaves[0], leaves[1]
        b = leaves[2] if bias else None
        if chunked:
            positions, targets = label_positions(label)
            loss = module._ChunkedCrossEntropy.apply(h[positions.clamp(max=399)], w, b, targets)
        else:
            loss = F.cross_entropy(
                F.linear(h, w, b), label[0, 1:], reduction="sum", ignore_index=IGNORE
            )
        (3 * loss).backward()
        return [loss.detach().double(), *(x.grad for x in leaves)]

    for found, expected in zip(run(True), run(False), strict=True):
        assert torch.isfinite(found).all()
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_more_than_a_linear_layer_is_noticed(make_model, data) -> None:
    model = make_model()
    assert find_plain_head(model) is not None
    plain, scaled = model.forward, 0.5

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * scaled
        return output

    batch = packed(data, [0, 1])
    positions, targets = label_positions(batch["labels"])
    whole = {**batch, "positions": positions, "targets": targets}
    same = summed_loss(model, whole, None), summed_loss(model, whole, find_plain_head(model))
    assert torch.allclose(*same, rtol=1e-5)
    for p in model.get_output_embeddings().parameters():
        p.data *= 50  # large logits, so that half of them is far from all of them
    model.forward = forward
    assert find_plain_head(model) is None


def test_a_window_without_labels_changes_nothing_and_is_no_nan(make_model, data) -> None:
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    result = train_step(
        model, (packed(data, []),), optimizer, None, CPU, 1.0, torch.float32, find_plain_head(model)
    )
    assert (result.labelled, result.loss.item()) == (0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_is_not_taken(make_model, data, fused: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    good = [packed(data, [n]) for n in range(3)]
    train_epoch(model, good, optimizer, None, CPU, dtype=torch.float32)
    before = [p.clone() for p in model.parameters()]
    model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NonFinite):
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
    ours = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    head = find_plain_head(model)
    for n in range(20):
        window = tuple(batches[2 * n : 2 * n + 2])
        step = train_step(model, window, optimizer, None, CPU, 1.0, torch.float32, head)
        ours.append(step.loss.item())

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
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [train_epoch(model, loader, optimizer, None, "cpu") for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0], losses


def test_fp16_uses_the_scaler_and_bf16_does_not(make_model, data) -> None:
    for dtype, enabled in [(torch.float16, True), (torch.bfloat16, False)]:
        model = make_model(packing=False)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10, growth_interval=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        before = model.lm_head.weight.clone()
        train_epoch(model, [padded(data, [0, 1])], optimizer, scaler, CPU, dtype=dtype)
        assert scaler.get_scale() == (2.0**11 if enabled else 1.0)
        assert not torch.equal(before, model.lm_head.weight)


def test_batches_of_the_loader_carry_the_rows_they_hold(data) -> None:
    sampler = TokenBudgetSampler(data.lengths, 64, 4, packing=True, seed=0)
    loader = make_loader(data, sampler, 2, 64, 4, packing=True, num_workers=1)
    batches = list(loader)
    assert sorted(row for b in batches for row in b["rows"]) == list(range(12))
    assert all(b["input_ids"].shape == (1, 256) for b in batches)
