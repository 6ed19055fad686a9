"""The loss of labelled positions, a chunk at a time, is the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import src.training.loss as loss_module
from conftest import packed
from src.data import IGNORE
from src.data.batching import with_targets
from src.models.head import PlainHead, find_plain_head
from src.training.loss import summed_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("labels", [0, 1, 127, 128, 300])
def test_the_chunked_loss_equals_the_full_one(labels: int) -> None:
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64) for shape in ((400, 16), (50, 16))]
    label = torch.full((1, 401), IGNORE)
    label[0, 1 + torch.randperm(400)[:labels]] = torch.randint(0, 50, (labels,))
    batch = with_targets({"input_ids": label, "labels": label})
    head = PlainHead(nn.Identity(), nn.Linear(1, 1), chunk=64)

    def run(chunked: bool) -> list[torch.Tensor]:
        h, w = (value.clone().requires_grad_() for value in values)
        if chunked:
            labelled = h[batch["positions"]]
            loss = loss_module._ChunkedCrossEntropy.apply(labelled, w, batch["targets"], head)
        else:
            logits = F.linear(h, w)
            loss = F.cross_entropy(logits, label[0, 1:], reduction="sum", ignore_index=IGNORE)
        (3 * loss).backward()
        return [loss.detach().double(), h.grad, w.grad]

    for chunked, full in zip(run(True), run(False), strict=True):
        assert torch.isfinite(chunked).all()
        assert torch.allclose(chunked, full, rtol=1e-5, atol=1e-5)


def changed_logits(model, change) -> None:
    forward = model.forward

    def changed(*args, **options):
        output = forward(*args, **options)
        output.logits = change(output.logits)
        return output

    model.forward = changed


# On small random weights a cap of 30 changes nothing that a comparison of logits could see.
HEADS = {
    "plain": lambda model: None,
    "zeros": lambda model: nn.init.zeros_(model.lm_head.weight),
    "scaled logits": lambda model: changed_logits(model, lambda logits: logits * 0.5),
    "capped logits": lambda model: changed_logits(model, lambda x: 30 * torch.tanh(x / 30)),
    "scaled input": lambda model: model.lm_head.register_forward_pre_hook(
        lambda _, arguments: (arguments[0] * 1.1,)
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_more_than_a_linear_layer_is_noticed(make_model, kind: str) -> None:
    model = make_model()
    HEADS[kind](model)
    head = find_plain_head(model, torch.float32)
    assert (head is not None) == (kind in {"plain", "zeros"})


@pytest.mark.parametrize("lora", [False, True])
def test_without_a_plain_head_labelled_logits_only_are_computed(make_model, data, lora: bool):
    model = make_model(lora=lora)
    batch, rows = packed(data, [0, 1, 2]), []
    model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: rows.append(logits.shape[:-1].numel())
    )
    loss = summed_loss(model, batch, None)
    head = find_plain_head(model, torch.float32)
    assert torch.allclose(loss, summed_loss(model, batch, head), rtol=1e-5)
    assert rows[0] == len(batch["positions"]) < batch["input_ids"].numel()
