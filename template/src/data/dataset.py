"""Rows become tokens and labels, once, in flat files that later runs map into memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from itertools import batched, islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from src.data import IGNORE
from src.data.cache import token_folder
from src.data.encoding import encode
from src.data.rows import read_rows
from src.utils.errors import RunError, UserError
from src.utils.files import new_folder, write_text

ROWS_AT_ONCE = 1000  # the tokenizer runs a list of texts in parallel
IDS, LABELS, LENGTHS, FACTS = "input_ids.bin", "labels.bin", "lengths.bin", "facts.json"


class TokenDataset:
    """Documents as tokens, memory-mapped: a million rows cost no more memory than a thousand.

    Attributes:
        lengths: tokens of each document after truncation, shape (documents,), int32.
        truncated: how many documents were cut at `max_length`.
        dropped: how many had no label left after that; they are not part of the dataset.
        labelled_tokens: labels that carry loss, over all documents.
        fingerprint: a hash of all tokens and labels.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.truncated: int = facts["truncated"]
        self.dropped: int = facts["dropped"]
        self.labelled_tokens: int = facts["labelled_tokens"]
        self.fingerprint: str = facts["fingerprint"]
        self.lengths = np.fromfile(folder / LENGTHS, np.int32)
        self._folder = folder
        self._bounds = np.concatenate([[0], self.lengths.cumsum(dtype=np.int64)])
        tokens = int(self._bounds[-1])
        # Given the shape, numpy refuses a file that is too short. As arrays: slices of memmaps
        # carry bookkeeping that takes longer than reading the tokens.
        self._ids = np.asarray(np.memmap(folder / IDS, np.int32, "r", shape=(tokens,)))
        self._labels = np.asarray(np.memmap(folder / LABELS, np.int32, "r", shape=(tokens,)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[Path]]:
        # A loader's worker maps the files again; pickled memmaps would be copied whole.
        return TokenDataset, (self._folder,)

    def documents(self, indices: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The (input_ids, labels) of these documents, each of shape (length,), int32."""
        spans = [slice(self._bounds[i], self._bounds[i + 1]) for i in indices]
        return [(self._ids[span], self._labels[span]) for span in spans]


def load_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limit: int | None = None,
) -> TokenDataset:
    """Read, check and tokenise a file or a hub dataset, or reuse what an earlier run made.

    Of several processes that want the same tokens one makes them, and the others wait.

    Args:
        source: `data.train` or `data.eval`.
        tokenizer: a fast tokenizer with a chat template.
        max_length: documents are cut after so many tokens.
        limit: use the first so many rows only.

    Raises:
        UserError: rows that cannot be used, or none from which anything can be learnt.
        RunError: the tokens cannot be written: no room, or no right to.
    """
    vocabulary = tokenizer.backend_tokenizer.to_str()
    folder = token_folder(source, limit, vocabulary, tokenizer.chat_template, max_length)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    _tokenise(folder, source, tokenizer, max_length, limit)
        except OSError as error:
            raise RunError(
                f"{folder}: tokens cannot be written: {error.strerror or error}; HF_HOME in .env "
                "can name another disk"
            ) from None
    return TokenDataset(folder)


def _tokenise(
    path: Path, source: str, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None
) -> None:
    """Write a folder of tokens, labels and lengths laid end to end, int32, and their facts."""
    truncated = dropped = labelled = number = 0
    lengths, digest = array("i"), hashlib.sha256()
    with new_folder(path) as folder:
        with (folder / IDS).open("wb") as ids_file, (folder / LABELS).open("wb") as labels_file:
            for rows in batched(islice(read_rows(source), limit), ROWS_AT_ONCE):
                batch_ids, batch_labels = array("i"), array("i")
                for ids, labels in encode(list(rows), tokenizer, number + 1, source):
                    number += 1
                    truncated += len(ids) > max_length
                    ids, labels = ids[:max_length], labels[:max_length]
                    count = len(labels) - labels.count(IGNORE)
                    if not count:
                        dropped += 1
                        continue
                    labelled += count
                    lengths.append(len(ids))
                    batch_ids.extend(ids)
                    batch_labels.extend(labels)
                for tokens, file in ((batch_ids, ids_file), (batch_labels, labels_file)):
                    tokens.tofile(file)
                    digest.update(tokens)
        if not lengths:
            raise UserError(
                f"{source}: nothing to learn from: in all {number} rows the first {max_length} "
                "tokens hold no assistant text; raise data.max_length"
            )
        with (folder / LENGTHS).open("wb") as file:
            lengths.tofile(file)
        digest.update(lengths)
        facts = {
            "source": source,
            "truncated": truncated,
            "dropped": dropped,
            "labelled_tokens": labelled,
            "fingerprint": digest.hexdigest()[:32],
        }
        write_text(folder / FACTS, json.dumps(facts, indent=1))
