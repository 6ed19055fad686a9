"""Count documents that a dataset holds twice, or shares with another one."""

import numpy as np

from src.data.dataset import TokenDataset


def repeated(dataset: TokenDataset) -> int:
    """Count the documents whose tokens equal those of an earlier one."""
    return len(dataset) - len(np.unique(_hashes(dataset)))


def shared(dataset: TokenDataset, other: TokenDataset) -> int:
    """Count the documents of `dataset` whose tokens equal those of one in `other`."""
    return int(np.isin(_hashes(dataset), _hashes(other)).sum())


def _hashes(dataset: TokenDataset) -> list[int]:
    """Hash each document's tokens to 64 bits, in a way that differs between processes."""
    rows = range(len(dataset))
    return [hash(ids.tobytes()) for row in rows for _, ids, _ in dataset[[row]]]
