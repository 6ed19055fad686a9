"""The tokens of all rows, made once, in flat files that later runs map into memory."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import batched, chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, Self, cast

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config, DataConfig
from src.data import IGNORE, Rejected
from src.data.chat import Rendered, turn_format
from src.data.encoding import TOKEN, encode, render_row
from src.data.rows import LeftOut, Row, check, no_rows, read_rows
from src.data.sources import expand, fingerprint
from src.utils.environment import hf_home
from src.utils.errors import RunError, UserError
from src.utils.files import new_folder, write_text

MANY = 1000  # rows; above it a share of hashes is close to a share of rows
ROWS_AT_ONCE = 1000  # the tokenizer runs a list of texts in parallel
TOKENS, LENGTHS, FACTS, LEFT_OUT = "tokens.bin", "lengths.bin", "facts.json", "left_out.jsonl"
Part = Literal["all", "train", "eval"]


class Document(NamedTuple):
    """A row, or a part of a long text, as tokens: int32 arrays of shape (length,)."""

    row: int  # the document's index in the dataset
    input_ids: np.ndarray
    labels: np.ndarray


@dataclass
class Facts:
    """What became of the rows that were read."""

    read_as: Counter[str] = field(default_factory=Counter)  # rows of each shape
    unread: Counter[str] = field(default_factory=Counter)  # columns that no token comes from
    notes: Counter[str] = field(default_factory=Counter)  # rows left out, changed or suspicious
    labelled_tokens: int = 0  # labels that carry loss, over all documents
    fingerprint: str = ""  # a hash of all tokens and labels


class TokenDataset:
    """Documents as tokens, memory-mapped: a million rows cost no more memory than a thousand.

    Attributes:
        lengths: tokens of each document after truncation, shape (documents,), int32.
        facts: what became of the rows.
        left_out: a file of the rows that were left out, each with its reason.
    """

    def __init__(self, folder: Path) -> None:
        self.facts = Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        self.left_out = folder / LEFT_OUT
        self.lengths = np.fromfile(folder / LENGTHS, np.int32)
        self._folder = folder
        self._bounds = np.concatenate([[0], self.lengths.cumsum(dtype=np.int64)])
        # With a shape, numpy refuses a file that is too short. asarray: slicing a memmap takes
        # longer than reading the tokens.
        self._tokens = np.asarray(np.memmap(folder / TOKENS, TOKEN, "r", shape=self._bounds[-1]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        # A loader's worker maps the file again; a pickled memmap would be copied whole.
        return type(self), (self._folder,)

    def __getitem__(self, rows: list[int]) -> list[Document]:
        """A whole batch at a time, as the sampler asks for it."""
        pairs = ((row, self._tokens[self._bounds[row] : self._bounds[row + 1]]) for row in rows)
        return [Document(row, some["input_ids"], some["labels"]) for row, some in pairs]

    def hashes(self) -> list[int]:
        """Hash each document's tokens to 64 bits, in a way that differs between processes."""
        return [hash(ids.tobytes()) for row in range(len(self)) for _, ids, _ in self[[row]]]


def load_documents(
    config: Config, tokenizer: Tokenizer
) -> tuple[TokenDataset, TokenDataset | None]:
    """A run's documents to train on and to evaluate on, as `load_tokens` makes them."""
    data, limit = config.data, config.training.overfit
    sources, part = rows_to_evaluate(config)
    train = load_tokens(data.train, tokenizer, data, limit, "train" if part == "eval" else "all")
    if limit:  # the same rows: these are what must be learnt
        return train, train
    return train, load_tokens(sources, tokenizer, data, part=part) if sources else None


def rows_to_evaluate(config: Config) -> tuple[str | list[str] | None, Part]:
    """The sources of the rows to evaluate on, None if there are none; and which part of them."""
    data = config.data
    if config.training.overfit:
        return data.train, "all"
    return (data.train, "eval") if isinstance(data.eval, int | float) else (data.eval, "all")


def load_tokens(
    sources: str | list[str], tokenizer: Tokenizer, data: DataConfig, limit: int | None = None,
    part: Part = "all",
) -> TokenDataset:  # fmt: skip
    """Read, check and tokenise files or hub datasets, or reuse what an earlier run made.

    If several processes need the same tokens, one makes them and the others wait.

    Args:
        sources: `data.train` or `data.eval`.
        tokenizer: a fast tokenizer with a chat template.
        data: how rows are read, and how long documents are.
        limit: use the first so many rows only.
        part: as `read_part` says.

    Raises:
        UserError: rows that cannot be used, or none from which anything can be learnt.
        RunError: the tokens cannot be written: no room, or no permission.
    """
    names = expand(sources)
    code = sorted(Path(__file__).parent.glob("*.py"))  # other code can make other tokens
    made_with = (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,  # which the vocabulary's file does not hold
        tokenizer.chat_template,
        *(limit, part, part != "all" and data.eval),
        data.model_dump(exclude={"train", "eval", "packing", "num_workers"}),
        *map(Path.read_bytes, code),
        *map(fingerprint, names),
    )
    digest = hashlib.sha256(repr(made_with).encode())
    folder = hf_home() / "tokens" / digest.hexdigest()[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                _tokenise(folder, names, tokenizer, data, limit, part)
    except OSError as error:
        reason = f"{error.strerror or error}; HF_HOME in .env can name another disk"
        raise RunError(f"{folder}: tokens cannot be written: {reason}") from None
    return TokenDataset(folder)


def read_part(
    sources: str | list[str], data: DataConfig, part: Part = "all",
    left_out: list[LeftOut] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Return the usable rows of some sources, or of a part where `data.eval` is a share of them.

    Rows are divided by their content, so that equal rows are never in both parts. Of up to MANY
    rows the share is met to the nearest row, equal rows aside. Of more it is met on average, and
    rows that are added later move no other row to the other part.
    """
    rows = chain.from_iterable(read_rows(name, data, left_out) for name in expand(sources))
    if part == "all":
        return rows
    first, share = list(islice(rows, MANY + 1)), cast(float, data.eval)
    limit = int(share * 2**64)  # rows with a hash below this are held out
    if len(first) <= MANY:
        hashes = sorted(map(_row_hash, first))
        held_out = min(max(1, round(share * len(hashes))), len(hashes) - 1)
        limit = next((h for h in hashes[held_out:] if h > hashes[0]), 0)
    return (row for row in chain(first, rows) if (_row_hash(row) < limit) == (part == "eval"))


def _row_hash(row: Row) -> int:
    """Return 64 bits that depend on what a row says, and not on its place."""
    said = [row.get(key) for key in ("messages", "tools", "text")]
    content = json.dumps(said, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest())


def _tokenise(
    path: Path, names: list[str], tokenizer: Tokenizer, data: DataConfig, limit: int | None,
    part: Part,
) -> None:  # fmt: skip
    """Write a folder: tokens with their labels end to end, documents' lengths, and facts."""
    facts, lengths, digest = Facts(), array("i"), hashlib.sha256()
    left_out: list[LeftOut] = []
    rows = islice(read_part(names, data, part, left_out), limit)
    with new_folder(path) as folder:
        with (folder / TOKENS).open("wb") as file:
            for document in _documents(rows, tokenizer, data, facts, left_out):
                lengths.append(len(document))
                file.write(document.tobytes())
                digest.update(document.tobytes())
                facts.labelled_tokens += int((document["labels"][1:] != IGNORE).sum())
        check(left_out, data)
        if not lengths:
            raise UserError(f"{', '.join(names)}, {part} rows: {no_rows(left_out)}")
        (folder / LENGTHS).write_bytes(lengths)
        digest.update(lengths)
        facts.fingerprint = digest.hexdigest()[:32]
        facts.notes.update(row.count_as for row in left_out)
        lines = (json.dumps(row._asdict(), default=str) + "\n" for row in left_out)
        write_text(folder / LEFT_OUT, "".join(lines))
        write_text(folder / FACTS, json.dumps(vars(facts), indent=1))


def _documents(
    rows: Iterable[Row], tokenizer: Tokenizer, data: DataConfig, facts: Facts,
    left_out: list[LeftOut],
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield documents as arrays of TOKEN, none longer than `data.max_length`."""
    length, batches = data.max_length, batched(_rendered(rows, tokenizer, left_out), ROWS_AT_ONCE)
    encoded = (zip(some, encode([r for _, r in some], tokenizer), strict=True) for some in batches)
    for (row, rendered), tokens in chain.from_iterable(encoded):
        size, is_text = len(tokens), "text" in row
        too_long = f"longer than data.max_length={length}" * (size > length)
        reason = "" if is_text or data.too_long == "cut" else too_long
        if (tokens["labels"][:length] == IGNORE).all():
            reason = reason or f"no answer within data.max_length={length}"
        if reason:
            more = f"{reason} ({size:,} tokens)"
            left_out.append(LeftOut(f"left out: {reason}", row["place"], more, row))
            continue
        facts.read_as[row["read_as"]] += 1
        facts.unread.update(row["unread"])
        facts.notes.update(_notes(row, rendered, tokenizer))
        if too_long:
            facts.notes[f"{'split' if is_text else 'cut'}: {too_long}"] += 1
        # All of a text is worth reading; of a conversation, its beginning.
        for start in range(0, size if is_text else 1, length):
            yield tokens[start : start + length]


def _rendered(
    rows: Iterable[Row], tokenizer: Tokenizer, left_out: list[LeftOut]
) -> Iterator[tuple[Row, Rendered]]:
    """Yield each row with its text; those that the chat template cannot write are left out."""
    for row in rows:
        try:
            yield row, render_row(row, tokenizer)
        except Rejected as error:
            left_out.append(LeftOut(error.count_as, row["place"], str(error), row))


def _notes(row: Row, rendered: Rendered, tokenizer: Tokenizer) -> Iterator[str]:
    """Say what is suspicious about a row."""
    if "text" in row:
        return
    turns = turn_format(tokenizer, str(tokenizer.chat_template))
    if any(token in m["content"] for m in row["messages"] for token in turns.end_tokens):
        yield "with a token of the chat template as text: it ends a turn there"
    if row["tools"] and not turns.prints_tools:
        yield "with tools, which the chat template does not print"
    if not rendered.prompted:
        yield "whose answers lack what the generation prompt ends with, e.g. <think>"
