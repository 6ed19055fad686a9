"""The tokens of all rows, made once, in flat files that later runs map into memory."""

import hashlib
import json
import os
from array import array
from itertools import batched, chain, islice
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import IGNORE
from src.data.encoding import encode
from src.data.rows import is_file, load_hub, read_rows
from src.utils.environment import from_root
from src.utils.errors import RunError, UserError
from src.utils.files import new_folder, write_text

ROWS_AT_ONCE = 1000  # the tokenizer runs a list of texts in parallel
IDS, LABELS, LENGTHS, FACTS = "input_ids.bin", "labels.bin", "lengths.bin", "facts.json"
# Who edits these makes other tokens: part of a cache's name, so that nobody has to empty it.
CODE = ("rows.py", "chat.py", "encoding.py", "dataset.py")


class Document(NamedTuple):
    """A row as tokens; both arrays have the shape (length,), int32."""

    row: int  # its index in the dataset
    input_ids: np.ndarray
    labels: np.ndarray


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

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        # A loader's worker maps the files again; pickled memmaps would be copied whole.
        return type(self), (self._folder,)

    def __getitem__(self, rows: list[int]) -> list[Document]:
        """A whole batch at a time, as the sampler asks for it."""
        spans = [(row, slice(self._bounds[row], self._bounds[row + 1])) for row in rows]
        return [Document(row, self._ids[span], self._labels[span]) for row, span in spans]


def load_tokens(
    source: str, tokenizer: Tokenizer, max_length: int, limit: int | None = None
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
    folder = _cache_folder(source, vocabulary, tokenizer.chat_template, max_length, limit)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    _tokenise(folder, source, tokenizer, max_length, limit)
        except OSError as error:
            why = f"{error.strerror or error}; HF_HOME in .env can name another disk"
            raise RunError(f"{folder}: tokens cannot be written: {why}") from None
    return TokenDataset(folder)


def _cache_folder(source: str, *made_with: object) -> Path:
    """A folder named by a hash of all that its tokens are made from."""
    digest = hashlib.sha256(repr(made_with).encode())
    for name in CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    if is_file(source):
        path = from_root(source)
        digest.update(path.suffix.encode())  # which decides how the bytes are read
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update(load_hub(source)._fingerprint.encode())
    # As huggingface_hub finds it, so that one setting moves all caches to a large disk.
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "tokens" / digest.hexdigest()[:32]


def _tokenise(
    path: Path, source: str, tokenizer: Tokenizer, max_length: int, limit: int | None
) -> None:
    """Write a folder of tokens, labels and lengths laid end to end, int32, and their facts."""
    read = truncated = labelled = 0
    lengths, digest = array("i"), hashlib.sha256()
    with new_folder(path) as folder:
        with (folder / IDS).open("wb") as ids_file, (folder / LABELS).open("wb") as labels_file:
            for rows in batched(islice(read_rows(source), limit), ROWS_AT_ONCE):
                encoded = encode(list(rows), tokenizer, read + 1, source)
                read += len(rows)
                truncated += sum(len(ids) > max_length for ids, _ in encoded)
                cut = [(ids[:max_length], labels[:max_length]) for ids, labels in encoded]
                kept = [(ids, labels) for ids, labels in cut if labels.count(IGNORE) < len(labels)]
                lengths.extend(len(ids) for ids, _ in kept)
                labelled += sum(len(labels) - labels.count(IGNORE) for _, labels in kept)
                for column, file in enumerate((ids_file, labels_file)):
                    tokens = array("i", chain.from_iterable(pair[column] for pair in kept))
                    tokens.tofile(file)
                    digest.update(tokens)
        if not lengths:
            raise UserError(
                f"{source}: nothing to learn from: in all {read} rows the first {max_length} "
                "tokens hold no assistant text; raise data.max_length"
            )
        (folder / LENGTHS).write_bytes(lengths)
        digest.update(lengths)
        facts = {"source": source, "truncated": truncated, "dropped": read - len(lengths)}
        facts |= {"labelled_tokens": labelled, "fingerprint": digest.hexdigest()[:32]}
        write_text(folder / FACTS, json.dumps(facts, indent=1))
