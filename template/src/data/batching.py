"""Documents become batches of a fixed number of tokens, in an order that seed and epoch fix."""

import bisect
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import batched
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Sampler

from src.config import Config
from src.data import IGNORE
from src.data.dataset import Document, TokenDataset
from src.utils.distributed import RANK, WORLD_SIZE

OPEN_BINS = 256  # how many part-filled rows packing chooses from
# Of a batch, what the model reads; the rest is for the loop and the loss.
MODEL_INPUTS = (
    *("input_ids", "attention_mask", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
FOR_THE_LOSS = (*MODEL_INPUTS, "positions", "targets")


class TokenBudgetSampler(Sampler[list[int]]):
    """Walks the batches of one epoch after another, each batch a list of document indices.

    Which documents share a batch is decided once, from the seed; an epoch permutes the batches.
    Every epoch then has the same number of steps, which the learning rate's schedule needs.
    All ranks compute the same plan and take every world_size-th batch of it. Where the last
    round lacks batches, ranks get an empty one (all filler), so that no rank waits for ever.

    Attributes:
        batches: of a whole epoch, over all ranks.
        epoch: which permutation is walked; set it before iterating.
        position: how many batches to skip, over all ranks, for a resumed run.
    """

    def __init__(
        self, lengths: np.ndarray, max_length: int, batch_size: int, packing: bool, seed: int,
        shuffle: bool = True, rank: int = RANK, world_size: int = WORLD_SIZE,
    ) -> None:  # fmt: skip
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self.epoch = self.position = 0
        order = np.arange(len(lengths))
        if shuffle:
            np.random.default_rng(seed).shuffle(order)
        budget = max_length * batch_size
        rows = pack(lengths, order, budget) if packing else batched(order.tolist(), batch_size)
        self._plan = [*map(list, rows)]
        self.batches = len(self._plan)
        # The first epoch begins with the batch that needs the most memory: if it is too much,
        # step 1 shows it.
        self._largest = np.argmax([lengths[rows].max() * len(rows) for rows in self._plan])

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank, whatever `position` is."""
        return -(-self.batches // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.batches)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
            if self.epoch == 0:
                first = int(np.argmax(order == self._largest))
                order[[0, first]] = order[[first, 0]]
        for turn in range(self.position, self.batches, self.world_size):
            place = turn + self.rank
            yield self._plan[order[place]] if place < self.batches else []


def pack(lengths: np.ndarray, order: np.ndarray, budget: int) -> list[list[int]]:
    """Best fit in the given order: each document into the fullest open row that still has room.

    Rows beyond OPEN_BINS are closed, fullest first. Over 97 % of the tokens of a 4 x 512 row
    are real for short chats, at O(log) per document, and documents stay near their neighbours
    in `order`, which sorting by length would destroy.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for document in order.tolist():
        length = int(lengths[document])
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = budget, len(rows)
            rows.append([])
        rows[row].append(document)
        if free > length:
            bisect.insort(room, (free - length, row))
            if len(room) > OPEN_BINS:
                room.pop(0)
    return rows


class TokenLoader(DataLoader):
    """A loader of ready batches: as `collate_packed` makes them, or `collate_padded`."""

    dataset: TokenDataset  # ty: ignore[incompatible-attribute-override]
    sampler: TokenBudgetSampler  # ty: ignore[incompatible-mutable-override]

    def __init__(
        self, dataset: TokenDataset, config: Config, pad_id: int, packing: bool = False,
        shuffle: bool = False, pin_memory: bool = False,
    ) -> None:  # fmt: skip
        data, rows, self.packing = config.data, config.training.batch_size, packing
        length = data.max_length
        collate = partial(collate_packed, budget=rows * length) if packing else collate_padded
        super().__init__(
            dataset,  # ty: ignore[invalid-argument-type] - it is indexed by lists
            sampler=TokenBudgetSampler(
                dataset.lengths, length, rows, packing, config.seed, shuffle
            ),
            batch_size=None,  # the sampler's items are batches already
            # No closure: spawned workers get it pickled.
            collate_fn=partial(collate, max_length=length, pad_id=pad_id),
            num_workers=data.num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own: workers' seeds must not shift the run's RNG
        )


def collate_packed(
    documents: list[Document], budget: int, max_length: int, pad_id: int
) -> dict[str, Any]:
    """Lay documents end to end in one row, and close it with masked filler.

    Returns:
        input_ids, labels, position_ids of shape (1, budget); positions restart at every
        document. cu_seq_lens_q and _k, int32: where documents begin, then the budget, repeated
        up to a power of two. max_length_q and _k: the longest document there can be. `tokens`:
        how many are real; `rows`: the documents' indices; and what `with_targets` adds.
    """
    *starts, end = np.cumsum([0, *(len(document.input_ids) for document in documents)]).tolist()
    starts += range(end, budget, max_length)  # filler is documents too, none of them longer
    batch = _lay_out(documents, starts, (1, budget), pad_id)
    positions = np.arange(budget) - np.repeat(starts, np.diff([*starts, budget]))
    # A power of two: few shapes to compile for, few empty documents for the kernel to visit.
    bounds = np.full(2 ** len(starts).bit_length(), budget, dtype=np.int32)
    bounds[: len(starts)] = starts
    batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.from_numpy(bounds))
    batch |= dict.fromkeys(("max_length_q", "max_length_k"), max_length)
    return batch | {"position_ids": torch.from_numpy(positions)[None]}


def full_batch(rows: int, length: int, packing: bool, labelled: float = 1.0) -> dict[str, Any]:
    """A microbatch of the largest size, of made-up tokens, to try a step or to plan one.

    Args:
        rows: documents, each of `length` tokens.
        length: tokens of a document.
        packing: whether they lie end to end in one row, or in rows of their own.
        labelled: the share of their tokens, at the end, that carry loss.
    """
    ids = np.zeros(length, dtype=np.int32)
    labels = np.where(np.arange(length) < length * (1 - labelled), IGNORE, 0)
    collate = partial(collate_packed, budget=rows * length) if packing else collate_padded
    return collate([Document(0, ids, labels)] * rows, max_length=length, pad_id=0)


def short_row(*firsts: int) -> dict[str, Any]:
    """A packed row of documents of eight tokens, to see what a model does with it.

    Args:
        firsts: the first token of each document; the others count up from there.
    """
    rows = [Document(0, ids, ids) for ids in (np.arange(first, first + 8) for first in firsts)]
    return collate_packed(rows, budget=8 * len(rows), max_length=8, pad_id=0)


def collate_padded(documents: list[Document], max_length: int, pad_id: int) -> dict[str, Any]:
    """One document a row, padded on the right to the longest, rounded up to a multiple of 64.

    No attention mask: under causal attention a real token never sees what stands right of it,
    and padding carries no label. Labels come from lengths, not from the pad id, which may be
    the stop token.

    Returns:
        input_ids and labels of shape (documents, length); `tokens`, `rows` and what
        `with_targets` adds, as above.
    """
    lengths = [len(document.input_ids) for document in documents]
    rows, width = max(len(lengths), 1), min(-(-max(lengths, default=1) // 64) * 64, max_length)
    return _lay_out(documents, range(0, rows * width, width), (rows, width), pad_id)


def _lay_out(
    documents: list[Document], starts: Iterable[int], shape: tuple[int, int], pad_id: int
) -> dict[str, Any]:
    ids, labels = np.full(np.prod(shape), pad_id), np.full(np.prod(shape), IGNORE)
    for (_, document_ids, document_labels), at in zip(documents, starts, strict=False):
        place = slice(at, at + len(document_ids))
        ids[place], labels[place] = document_ids, document_labels
        labels[at] = IGNORE  # else the last token of the document before would predict it
    return with_targets(
        {
            "input_ids": torch.from_numpy(ids).view(shape),
            "labels": torch.from_numpy(labels).view(shape),
            "tokens": sum(len(document.input_ids) for document in documents),
            "rows": [document.row for document in documents],
        }
    )


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Add where labels are predicted and how many there are, if that is not there yet.

    This happens on the CPU, before memory is pinned: how many there are depends on values, which
    the CPU would have to wait for if they were on a GPU.

    Returns:
        The batch with `positions` in the flattened (rows x length) batch and `targets`, both of
        shape (labels,), padded with target -100 to a multiple of 128, so that few shapes occur;
        `labelled`, how many are real; and `tokens`, all of them if `collate_…` did not count.
    """
    if "positions" in batch:
        return batch
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()  # the next token's
    positions = (shifted != IGNORE).nonzero().squeeze(1)
    missing = -len(positions) % 128
    return {
        "tokens": batch["input_ids"].numel(),
        **batch,
        "positions": F.pad(positions, (0, missing)),
        "targets": F.pad(shifted[positions], (0, missing), value=IGNORE),
        "labelled": len(positions),
    }


def to_device(
    batch: dict[str, Any], device: torch.device, names: tuple[str, ...] = FOR_THE_LOSS
) -> dict[str, Any]:
    """Return what the loss reads of a batch, on a device."""
    return {
        # non_blocking: the loader pins its memory, so the copy runs beside the step before.
        k: v.to(device, non_blocking=True) if isinstance(v := batch[k], torch.Tensor) else v
        for k in names
        if k in batch
    }
