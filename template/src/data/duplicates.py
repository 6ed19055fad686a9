"""Count documents that a dataset holds twice, or shares with another one."""

import hashlib

import numpy as np

from src.data.dataset import TokenDataset

BATCH = 1000  # documents that are read at a time


def repeated(dataset: TokenDataset) -> int:
    """Count the documents whose tokens equal those of an earlier one."""
    return len(dataset) - len(np.unique(_hashes(dataset)))


def shared(dataset: TokenDataset, other: TokenDataset) -> int:
    """Count the documents of `dataset` whose tokens equal those of one in `other`."""
    return int(np.isin(_hashes(dataset), _hashes(other)).sum())


def _hashes(dataset: TokenDataset) -> np.ndarray:
    """Hash each document's tokens to 64 bits; shape (documents,)."""
    hashes = np.empty(len(dataset), np.uint64)
    for start in range(0, len(dataset), BATCH):
        for row, ids, _ in dataset[list(range(start, min(start + BATCH, len(dataset))))]:
            digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
            hashes[row] = int.from_bytes(digest)
    return hashes
