"""Roads from rows to an answer that few take."""

import pytest

import scripts.train
from conftest import chat, metrics
from src.training import run as run_module
from test_road import base as base
from test_road import command
from test_road import rows as rows


@pytest.mark.slow
def test_a_run_goes_on_in_another_dtype(base, rows, tmp_path) -> None:
    # As on another card: one without bf16 needs fp16 and its scaler.
    for step, dtype in enumerate(("bf16", "fp16", "bf16"), 1):
        options = [f"model.dtype={dtype}", f"training.max_steps={step}", "training.resume=auto"]
        scripts.train.main(command(base("untied"), rows, tmp_path / "run", *options))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_an_epoch_is_logged_as_one_where_processes_outnumber_its_batches(
    train, write_rows, monkeypatch
) -> None:
    monkeypatch.setattr(run_module, "WORLD_SIZE", 2)  # of which the second gets a batch of filler
    row = f"data.train={write_rows(chat('q', 'a'))}"
    folder = train(row, "data.eval=null", "training.epochs=3", "training.log_every=1")
    assert [(line["step"], line["epoch"]) for line in metrics(folder)] == [(1, 1), (2, 2), (3, 3)]


def test_seeds_are_set_before_anything_can_start_cuda(train, monkeypatch) -> None:
    # cuBLAS reads its setting for `deterministic` once, when CUDA starts: asking for a dtype does.
    order = []
    for name in ("set_seed", "pick_device", "pick_dtype", "load_tokenizer"):
        real = getattr(run_module, name)
        spy = lambda *a, _r=real, _n=name, **k: order.append(_n) or _r(*a, **k)  # noqa: E731
        monkeypatch.setattr(run_module, name, spy)
    train("training.max_steps=1", "data.eval=null")
    assert order[0] == "set_seed"
