"""Batches lose nothing, repeat nothing, and come in an order that can be resumed."""

import pickle

import numpy as np
import pytest
import torch

from conftest import SMOKE
from src.config import load_config
from src.data import IGNORE
from src.data.batching import (
    TokenBudgetSampler,
    TokenLoader,
    collate_packed,
    collate_padded,
    pack,
    with_targets,
)
from src.data.dataset import Document


def short_chats(count: int) -> np.ndarray:
    """Lengths of short chats: median about 60 tokens, some near 512."""
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(4.1, 0.8, count), 8, 512).astype(int)


def test_packing_loses_no_document_and_wastes_under_three_percent() -> None:
    lengths = short_chats(5000)
    rows = pack(lengths, np.random.default_rng(1).permutation(5000), 4 * 512)
    assert sorted(d for row in rows for d in row) == list(range(5000))
    assert all(lengths[row].sum() <= 2048 for row in rows)
    assert lengths.sum() / (len(rows) * 2048) > 0.97


def sampler(seed: int = 0, epoch: int = 0, packing: bool = True, **ranks) -> TokenBudgetSampler:
    made = TokenBudgetSampler(short_chats(401), 512, 4, packing=packing, seed=seed, **ranks)
    made.epoch = epoch
    return made


def test_the_order_depends_on_seed_and_epoch_only_and_is_resumed() -> None:
    first, whole = (list(sampler(seed=1, epoch=epoch)) for epoch in (1, 2))
    assert first == list(sampler(seed=1, epoch=1)) != whole
    assert sorted(map(sorted, first)) == sorted(map(sorted, whole))
    assert sorted(map(sorted, first)) != sorted(map(sorted, sampler(seed=2, epoch=1)))
    resumed = sampler(seed=1, epoch=2)
    resumed.position = 4
    assert list(resumed) == whole[4:]
    assert len(resumed) == len(whole)


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_the_batches_equally_and_completely(packing: bool) -> None:
    alone = list(sampler(packing=packing))
    ranks = [list(sampler(packing=packing, rank=rank, world_size=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    merged = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert [batch for batch in merged if batch] == alone


def test_the_batch_that_needs_the_most_memory_comes_first() -> None:
    lengths = short_chats(401)
    sizes = [max(lengths[batch]) * len(batch) for batch in sampler(packing=False)]
    assert sizes[0] == max(sizes)


def documents(*lengths: int) -> list[Document]:
    return [Document(row, np.arange(n) + 10, np.arange(n) + 10) for row, n in enumerate(lengths)]


def test_a_packed_batch_always_has_the_same_number_of_tokens() -> None:
    for lengths in [(), (5,), (16, 16), (3, 4, 5, 6)]:
        batch = collate_packed(documents(*lengths), budget=32, max_length=16, pad_id=0)
        assert batch["input_ids"].shape == batch["labels"].shape == (1, 32)
        assert batch["tokens"] == sum(lengths)
        assert batch["labelled"] == sum(n - 1 for n in lengths)
        starts = batch["cu_seq_lens_q"].tolist()
        assert (batch["labels"][0, [s for s in starts if s < 32]] == IGNORE).all()
        assert (batch["position_ids"][0, [s for s in starts if s < 32]] == 0).all()
        assert starts[-1] == 32
        assert max(np.diff(starts)) <= 16


def test_padding_carries_no_label_even_where_it_equals_the_stop_token() -> None:
    batch = collate_padded(documents(5, 3), max_length=64, pad_id=12)
    assert batch["input_ids"].shape == (2, 64)
    assert batch["labels"][1].tolist()[:4] == [IGNORE, 11, 12, IGNORE]
    assert batch["labelled"] == 4 + 2


def test_labels_shift_by_one() -> None:
    batch = with_targets(
        {"input_ids": torch.arange(4)[None], "labels": torch.tensor([[IGNORE, 5, IGNORE, 7]])}
    )
    assert batch["positions"][:2].tolist() == [0, 2]
    assert batch["targets"][:3].tolist() == [5, 7, IGNORE]
    assert (batch["labelled"], batch["tokens"]) == (2, 4)
    assert len(batch["positions"]) == len(batch["targets"]) == 128


def make_loader(data, *overrides: str) -> TokenLoader:
    config = load_config(SMOKE, ["data.max_length=64", *overrides])
    return TokenLoader(data, config, 2, packing=config.data.packing, shuffle=True, pin_memory=False)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_batches_carry_the_rows_they_hold_and_can_be_made_by_a_spawned_worker(
    data, packing: str
) -> None:
    loader = make_loader(data, f"data.packing={packing}")
    batches = list(loader)
    assert sorted(row for batch in batches for row in batch["rows"]) == list(range(12))
    for batch in batches:
        assert batch["tokens"] == sum(data.lengths[batch["rows"]])
        assert packing == "false" or batch["input_ids"].shape == (1, 256)
    collate, rows = pickle.loads(pickle.dumps((loader.collate_fn, loader.dataset)))
    for indices in ([0, 3], [], [5, 1, 2]):
        assert same(collate(rows[indices]), loader.collate_fn(data[indices]))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_make_the_same_batches(data, start: str) -> None:
    alone = list(make_loader(data))
    loader = make_loader(data, "data.num_workers=1")
    loader.multiprocessing_context = start
    for batch, expected in zip(loader, alone, strict=True):
        assert same(batch, expected)
