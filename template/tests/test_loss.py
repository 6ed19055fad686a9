"""The loss of labelled positions, a chunk at a time, is the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import src.training.loss as loss_module
from conftest import packed
from src.data import IGNORE
from src.data.batching import with_targets
from src.training.loss import find_plain_head, summed_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("labels", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_loss_equals_the_full_one(labels: int, bias: bool) -> None:
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
            batch = with_targets({"input_ids": label, "labels": label})
            head = loss_module.PlainHead(nn.Identity(), nn.Linear(1, 1), chunk=64)
            loss = loss_module._ChunkedCrossEntropy.apply(
                h[batch["positions"]], w, b, batch["targets"], head
            )
        else:
            loss = F.cross_entropy(
                F.linear(h, w, b), label[0, 1:], reduction="sum", ignore_index=IGNORE
            )
        (3 * loss).backward()
        return [loss.detach().double(), *(x.grad for x in leaves)]

    for found, expected in zip(run(True), run(False), strict=True):
        assert torch.isfinite(found).all()
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_zeros_is_plain(make_model) -> None:
    model = make_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert find_plain_head(model, CPU, torch.float32) is not None


def test_a_head_that_is_more_than_a_linear_layer_is_noticed(make_model, data) -> None:
    model = make_model()
    plain, scaled = model.forward, 0.5

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * scaled
        return output

    batch = packed(data, [0, 1])
    head = find_plain_head(model, CPU, torch.float32)
    assert head is not None
    same = summed_loss(model, batch, None), summed_loss(model, batch, head)
    assert torch.allclose(*same, rtol=1e-5)
    for p in model.get_output_embeddings().parameters():
        p.data *= 50  # large logits, so that half of them is far from all of them
    model.forward = forward
    assert find_plain_head(model, CPU, torch.float32) is None


@pytest.mark.parametrize("what", ["capped logits", "a scaled input"])
def test_a_head_is_watched_rather_than_its_logits_compared(make_model, monkeypatch, what) -> None:
    # On small random weights a cap of 30 changes nothing that a comparison could see.
    model = make_model()
    plain = model.forward
    if what == "capped logits":

        def forward(*args, **kwargs):
            output = plain(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

        monkeypatch.setattr(model, "forward", forward)
    else:
        model.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1.1,))
    assert find_plain_head(model, CPU, torch.float32) is None


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_of_its_own_computes_labelled_logits_only(make_model, data, lora: bool) -> None:
    model = make_model(lora=lora)
    batch, rows = packed(data, [0, 1, 2]), []
    model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: rows.append(logits.shape[:-1].numel())
    )
    loss = summed_loss(model, batch, None)
    head = find_plain_head(model, CPU, torch.float32)
    assert torch.allclose(loss, summed_loss(model, batch, head), rtol=1e-5)
    assert rows[0] == len(batch["positions"]) < batch["input_ids"].numel()
