"""The tokens of all rows, made once, in flat files that later runs map into memory."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import batched, chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, Self, cast

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config, DataConfig
from src.data import IGNORE, Rejected
from src.data.chat import knows_tools, types_token
from src.data.encoding import encode
from src.data.rows import Row, Tally, read_rows
from src.data.sources import expand, fingerprint
from src.utils.environment import hf_home
from src.utils.errors import RunError, UserError
from src.utils.files import new_folder, write_text

MANY = 1000  # rows, from which on a share of their hashes is close to a share of the rows
ROWS_AT_ONCE = 1000  # the tokenizer runs a list of texts in parallel
IDS, LABELS, LENGTHS, FACTS = "input_ids.bin", "labels.bin", "lengths.bin", "facts.json"
LEFT_OUT = "left_out.jsonl"
Part = Literal["all", "train", "eval"]
# Who edits these makes other tokens: part of a cache's name, so that nobody has to empty it.
CODE = ("sources.py", "rows.py", "chat.py", "encoding.py", "dataset.py")


class Document(NamedTuple):
    """A row as tokens; both arrays have the shape (length,), int32."""

    row: int  # its index in the dataset
    input_ids: np.ndarray
    labels: np.ndarray


@dataclass
class Facts:
    """What became of the rows that were read."""

    read_as: Counter[str] = field(default_factory=Counter)  # rows of each shape
    empty: int = 0  # rows left out: nothing to learn from
    unusable: int = 0  # rows left out with data.bad_rows=skip: see left_out.jsonl
    unread: Counter[str] = field(default_factory=Counter)  # columns that no token comes from
    typed: int = 0  # rows whose text holds a token that the chat template writes
    missing_tools: int = 0  # rows whose tools the chat template does not write
    unprompted: int = 0  # rows that lack what the generation prompt writes
    truncated: int = 0  # conversations cut at data.max_length, or left out: data.too_long
    split: int = 0  # texts that became several documents
    dropped: int = 0  # rows with no label left after that
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


def load_documents(
    config: Config, tokenizer: Tokenizer
) -> tuple[TokenDataset, TokenDataset | None]:
    """A run's documents to train on and to evaluate on, as `load_tokens` makes them."""
    data, overfit = config.data, config.training.overfit
    if overfit is not None:  # what is overfitted is what must be learnt: evaluate on it too
        train = load_tokens(data.train, tokenizer, data, overfit)
        return train, train
    if isinstance(data.eval, int | float):
        train = load_tokens(data.train, tokenizer, data, part="train")
        return train, load_tokens(data.train, tokenizer, data, part="eval")
    train = load_tokens(data.train, tokenizer, data)
    return train, None if data.eval is None else load_tokens(data.eval, tokenizer, data)


def load_tokens(
    sources: str | list[str], tokenizer: Tokenizer, data: DataConfig, limit: int | None = None,
    part: Part = "all",
) -> TokenDataset:  # fmt: skip
    """Read, check and tokenise files or hub datasets, or reuse what an earlier run made.

    Of several processes that want the same tokens one makes them, and the others wait.

    Args:
        sources: `data.train` or `data.eval`.
        tokenizer: a fast tokenizer with a chat template.
        data: how rows are read, and how long documents are.
        limit: use the first so many rows only.
        part: of the rows, where `data.eval` is a share of them: by their content, so that equal
            rows are never in both.

    Raises:
        UserError: rows that cannot be used, or none from which anything can be learnt.
        RunError: the tokens cannot be written: no room, or no right to.
    """
    names = expand(sources)
    made_with = {
        "vocabulary": tokenizer.backend_tokenizer.to_str(),
        "special tokens": tokenizer.special_tokens_map,  # which the vocabulary's file does not hold
        "template": tokenizer.chat_template,
        "rows": (limit, part, part != "all" and data.eval),
        "data": data.model_dump(exclude={"train", "eval", "packing", "num_workers"}),
    }
    folder = _cache_folder(names, made_with)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    _tokenise(folder, names, tokenizer, data, limit, part)
        except OSError as error:
            reason = f"{error.strerror or error}; HF_HOME in .env can name another disk"
            raise RunError(f"{folder}: tokens cannot be written: {reason}") from None
    return TokenDataset(folder)


def _cache_folder(names: list[str], made_with: dict[str, object]) -> Path:
    """A folder named by a hash of all that its tokens are made from."""
    digest = hashlib.sha256(repr(made_with).encode())
    for name in CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    for name in names:
        digest.update(fingerprint(name))
    return hf_home() / "tokens" / digest.hexdigest()[:32]


def _tokenise(
    path: Path, names: list[str], tokenizer: Tokenizer, data: DataConfig, limit: int | None,
    part: Part,
) -> None:  # fmt: skip
    """Write a folder of tokens, labels and lengths laid end to end, int32, and their facts."""
    facts, tally, lengths, digest = Facts(), Tally(), array("i"), hashlib.sha256()
    rows = chain.from_iterable(read_rows(name, data, tally) for name in names)
    if part != "all":
        limit_of_eval = evaluation_limit(names, data)
        rows = (row for row in rows if (row_hash(row) < limit_of_eval) == (part == "eval"))
    with new_folder(path) as folder:
        with (folder / IDS).open("wb") as ids_file, (folder / LABELS).open("wb") as labels_file:
            for some in batched(islice(rows, limit), ROWS_AT_ONCE):
                documents = list(_documents(list(some), tokenizer, data, facts, tally))
                lengths.extend(len(ids) for ids, _ in documents)
                for column, file in enumerate((ids_file, labels_file)):
                    tokens = array("i", chain.from_iterable(pair[column] for pair in documents))
                    tokens.tofile(file)
                    digest.update(tokens)
        tally.check()
        if not lengths:
            reason = tally.reason_for_none() or (
                f"nothing to learn from: in all rows the first {data.max_length} tokens hold no "
                "assistant text; raise data.max_length"
            )
            if part != "all":
                reason = f"data.eval={data.eval} leaves too few rows for one of the two parts"
            raise UserError(f"{', '.join(names)}: {reason}")
        (folder / LENGTHS).write_bytes(lengths)
        digest.update(lengths)
        facts.empty, facts.unusable = len(tally.empty), len(tally.unusable)
        facts.fingerprint = digest.hexdigest()[:32]
        left_out = [*tally.unusable, *tally.empty, *tally.too_long]
        lines = (json.dumps(each, default=str) + "\n" for each in left_out)
        write_text(folder / LEFT_OUT, "".join(lines))
        write_text(folder / FACTS, json.dumps(vars(facts), indent=1))


def _documents(
    rows: list[Row], tokenizer: Tokenizer, data: DataConfig, facts: Facts, tally: Tally
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of documents, none longer than `data.max_length`."""
    length = data.max_length
    for row, encoded in zip(rows, encode(rows, tokenizer), strict=True):
        if isinstance(encoded, Rejected):
            tally.reject(encoded, row["place"], row, data)
            continue
        ids, labels, prompted = encoded
        facts.read_as[row["read_as"]] += 1
        facts.unread.update(row["unread"])
        facts.unprompted += not prompted
        too_long, starts = len(ids) > length, range(1)
        if "text" in row:  # all of it is worth reading
            facts.split += too_long
            starts = range(0, len(ids), length)
        else:
            facts.truncated += too_long
            facts.typed += types_token(row["messages"], tokenizer)
            facts.missing_tools += bool(row["tools"]) and not knows_tools(tokenizer)
            if too_long and data.too_long == "drop":
                starts = range(0)
        answered = False
        for start in starts:
            piece = labels[start : start + length]
            labelled = len(piece) - piece.count(IGNORE)
            facts.labelled_tokens += labelled
            facts.dropped += not labelled
            if labelled:
                answered = True
                yield ids[start : start + length], piece
        if not answered:
            reason = f"no answer in the first {length} of its {len(ids)} tokens (data.max_length)"
            tally.too_long.append({"place": row["place"], "reason": reason})


def evaluation_limit(names: list[str], data: DataConfig) -> int:
    """Rows with a `row_hash` below this are held out: the share `data.eval` of all rows.

    Of up to MANY rows the share is met as exactly as whole rows allow. Of more it is met on
    average, and rows that are added later move no other row to the other part.
    """
    share = float(cast(float, data.eval))
    rows = chain.from_iterable(read_rows(name, data) for name in names)
    hashes = sorted(map(row_hash, islice(rows, MANY + 1)))
    if len(hashes) > MANY:
        return int(share * 2**64)
    held_out = max(1, round(share * len(hashes)))
    # The hash after the last row that is held out; equal rows stay together.
    return next((h for h in hashes[held_out:] if h > hashes[0]), 0)


def row_hash(row: Row) -> int:
    """64 bits that depend on what a row says, and not on its place."""
    said = [row.get(key) for key in ("messages", "tools", "text")]
    content = json.dumps(said, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest())
