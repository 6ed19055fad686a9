"""Read rows from files or the hub, and say file and line of each one that training cannot use.

`datasets` reads JSON too, but reports neither file nor line, and turns a missing key into None.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.utils.environment import PROJECT_ROOT, from_root
from src.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "user", "assistant", "tool")
SHAPES = "`messages`, `prompt` and `completion`, or `text`"
MAX_PROBLEMS = 20  # of one file: enough to see a pattern, few enough to read
FIRST_ROWS = 100  # what is looked at before a start

# A row as `read_rows` yields it: either {"messages": [...]} or {"text": "..."}.
Row = dict[str, Any]
Places = Iterator[tuple[str, Any]]  # pairs of a place in the file (":3" is its line) and a raw row


def is_file(source: str) -> bool:
    """Whether `data.train` names a file rather than a dataset on the hub."""
    return source.endswith(tuple(READERS)) or from_root(source).exists()


def check_source(key: str, source: str) -> None:
    """Look at a local file and its first rows, before anything heavy is imported.

    All rows are read when they are tokenised; of a hub dataset only the name is looked at here.

    Raises:
        UserError: the file is missing or empty, or rows cannot be used: file, line and reason.
    """
    if not is_file(source):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
            raise UserError(f"{key}: {source}: neither a {', '.join(READERS)} file nor a hub id")
    elif not from_root(source).is_file():
        where = f"paths are relative to the project, {PROJECT_ROOT}"
        raise UserError(f"{key}: {source}: no such file ({where})")
    elif not list(islice(read_rows(source), FIRST_ROWS)):
        raise UserError(f"{source}: no rows; {key} needs at least one of {SHAPES}")


def read_rows(source: str) -> Iterator[Row]:
    """Yield normalised rows of a file or hub dataset, in order, one at a time.

    `prompt` and `completion` become a user's and an assistant's turn, so that training and
    `scripts/inference.py` speak through one chat template.

    Raises:
        UserError: after the last row, or the twentieth bad one: a line per bad row.
    """
    problems: list[str] = []
    for place, raw in _raw_rows(source):
        row = raw if isinstance(raw, Unreadable) else _normalise(raw)
        if isinstance(row, str):
            problems.append(f"{source}{place}: {row}")
        elif not problems:
            yield row
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"{source}: stopped reading after {MAX_PROBLEMS} bad rows")
            break
    if problems:
        raise UserError(*problems)


class Unreadable(str):
    """Stands where a row should be, and says why there is none."""

    __slots__ = ()


def _raw_rows(source: str) -> Places:
    if not is_file(source):
        yield from _numbered(load_hub(source))
        return
    path = from_root(source)
    if path.suffix not in READERS:
        found = path.suffix or "a folder"
        raise UserError(f"{source}: {found} is not one of {', '.join(READERS)}")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error.reason}); re-save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None


def _numbered(rows: Iterable[Any]) -> Places:
    return ((f": row {number}", row) for number, row in enumerate(rows, 1))


def _jsonl(path: Path) -> Places:
    # As bytes: one that is not UTF-8 then names its own line, not the whole file.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                row = Unreadable(f"not UTF-8 ({error.reason}); re-save the file as UTF-8")
            except ValueError as error:
                row = Unreadable(f"not valid JSON: {getattr(error, 'msg', error)}")
            yield f":{number}", row


def _json(path: Path) -> Places:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        yield f":{error.lineno}", Unreadable(f"not valid JSON: {error.msg}")
        return
    if not isinstance(rows, list):
        rows = [Unreadable("a .json file holds a list of rows; one row a line is .jsonl")]
    yield from _numbered(rows)


def _csv(path: Path) -> Places:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                row = Unreadable("more cells than the header has; quote commas in text")
            yield f":{reader.line_num}", row


def _parquet(path: Path) -> Places:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
        yield from _numbered(row for batch in batches for row in batch.to_pylist())
    except pa.ArrowInvalid as error:
        yield "", Unreadable(f"not a Parquet file ({str(error).splitlines()[0]})")


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def load_hub(source: str) -> "Dataset":
    """A split of a dataset on the hub, or in its cache.

    Raises:
        UserError: there is no such dataset or split, or this process may not see it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, split = source.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        why = f"not found on the hub and not in its cache ({str(error).splitlines()[0]})"
        raise UserError(f"{source}: {why}; a private one needs HF_TOKEN in .env") from None
    except ValueError as error:  # an unknown split, or a dataset of several configurations
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from None


def _normalise(raw: Any) -> Row | str:
    """The row in one of its two forms, or what is wrong with it."""
    if not isinstance(raw, dict):
        return f"a row is an object with {SHAPES}, not {_kind(raw)}"
    if raw.get("messages") is not None:
        return _not_messages(raw["messages"]) or {"messages": raw["messages"]}
    if "prompt" in raw or "completion" in raw:
        turns = {"prompt": "user", "completion": "assistant"}
        return next(filter(None, (_not_text(key, raw) for key in turns)), None) or {
            "messages": [{"role": role, "content": raw[key]} for key, role in turns.items()]
        }
    if "text" in raw:
        return _not_text("text", raw) or {"text": raw["text"]}
    return f"has {', '.join(f'`{k}`' for k in raw) or 'no keys'}; a row needs {SHAPES}"


def _not_messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "`messages` must be a list with at least one message"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} must be an object with `role` and `content`"
        if message.get("role") not in ROLES:
            return f"message {number}: `role` is {message.get('role')!r}, not {' | '.join(ROLES)}"
        wrong = _not_text("content", message, may_be_empty=True)
        if wrong and not message.get("tool_calls"):
            return f"message {number}: {wrong}"
    spoken = (m for m in messages if m["role"] == "assistant")
    if not any((m.get("content") or "").strip() or m.get("tool_calls") for m in spoken):
        return "nothing to learn from: no assistant message with text"
    return None


def _not_text(key: str, row: dict, may_be_empty: bool = False) -> str | None:
    if key not in row:
        return f"`{key}` is missing"
    if not isinstance(row[key], str):
        return f"`{key}` must be text, not {_kind(row[key])}"
    if not (may_be_empty or row[key].strip()):
        return f"`{key}` is empty: there is nothing to learn from"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
