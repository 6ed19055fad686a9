"""Read rows from files or the hub, and say file and line of each one that training cannot use.

`datasets` reads JSON too, but reports neither file nor line, and turns a missing key into None.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.utils.environment import PROJECT_ROOT, from_root
from src.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ROLES = ("system", "user", "assistant", "tool")
SHAPES = "`messages`, `prompt` and `completion`, or `text`"
MAX_PROBLEMS = 20  # of one file: enough to see a pattern, few enough to read

# A row as every reader here yields it: either {"messages": [...]} or {"text": "..."}.
Row = dict[str, Any]


def is_file(source: str) -> bool:
    """Whether `data.train` names a file rather than a dataset on the hub."""
    return source.endswith(SUFFIXES) or from_root(source).exists()


def check_source(key: str, source: str) -> None:
    """Read every row of a local file once, before anything heavy is imported.

    A hub id is only looked at: its rows are checked when they are tokenised.

    Raises:
        UserError: the file is missing or empty, or rows cannot be used: file, line and reason.
    """
    if not is_file(source):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
            raise UserError(f"{key}: {source}: neither a {', '.join(SUFFIXES)} file nor a hub id")
        return
    path = from_root(source)
    if not path.is_file():
        raise UserError(
            f"{key}: {source}: no such file (paths are relative to the project, {PROJECT_ROOT})"
        )
    if sum(1 for _ in read_rows(source)) == 0:
        raise UserError(f"{source}: no rows; {key} needs at least one of {SHAPES}")


def read_rows(source: str) -> Iterator[Row]:
    """Yield normalised rows of a file or hub dataset, in order, one at a time.

    `prompt` and `completion` become a user's and an assistant's turn, so that training and
    `scripts/inference.py` speak through one chat template.

    Raises:
        UserError: after the last row, or the twentieth bad one: a line per bad row.
    """
    problems: list[str] = []
    for where, raw in _raw_rows(source, problems):
        row = _normalise(raw)
        if isinstance(row, str):
            problems.append(f"{where}: {row}")
        elif not problems:
            yield row
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"{source}: stopped reading after {MAX_PROBLEMS} bad rows")
            break
    if problems:
        raise UserError(*problems)


def _raw_rows(source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) pairs; unreadable lines go to `problems`, with their line."""
    if not is_file(source):
        yield from ((f"{source}: row {n}", row) for n, row in enumerate(load_hub(source), 1))
        return
    path = from_root(source)
    readers: dict[str, Callable[[Path, str, list[str]], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if path.suffix not in readers:
        raise UserError(
            f"{source}: {path.suffix or 'a folder'} is not one of {', '.join(SUFFIXES)}"
        )
    try:
        yield from readers[path.suffix](path, source, problems)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error.reason}); re-save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None


def _jsonl_rows(path: Path, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    # As bytes: one that is not UTF-8 then names its own line, not the whole file.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{source}:{number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                problems.append(f"{where}: not UTF-8 ({error.reason}); re-save the file as UTF-8")
            except ValueError as error:
                problems.append(f"{where}: not valid JSON: {getattr(error, 'msg', error)}")


def _json_rows(path: Path, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        problems.append(f"{source}:{error.lineno}: not valid JSON: {error.msg}")
        return
    if not isinstance(rows, list):
        problems.append(f"{source}: a .json file holds a list of rows; one row a line is .jsonl")
        return
    yield from ((f"{source}: row {n}", row) for n, row in enumerate(rows, 1))


def _csv_rows(path: Path, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{source}:{reader.line_num}"
            if None in row:
                problems.append(f"{where}: more cells than the header has; quote commas in text")
                continue
            yield where, row


def _parquet_rows(path: Path, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{source}: row {n}", row) for n, row in enumerate(rows, 1))
    except pa.ArrowInvalid as error:
        problems.append(f"{source}: not a Parquet file ({str(error).splitlines()[0]})")


def load_hub(source: str) -> Dataset:
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
        raise UserError(
            f"{source}: not found on the hub and not in its cache "
            f"({str(error).splitlines()[0]}); a private one needs HF_TOKEN in .env"
        ) from None
    except ValueError as error:  # an unknown split, or a dataset of several configurations
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from None


def _normalise(raw: Any) -> Row | str:
    """The row in one of its two forms, or what is wrong with it."""
    if not isinstance(raw, dict):
        return f"a row is an object with {SHAPES}, not {_kind(raw)}"
    if raw.get("messages") is not None:
        return _check_messages(raw["messages"])
    if "prompt" in raw or "completion" in raw:
        for key in ("prompt", "completion"):
            if not isinstance(raw.get(key), str):
                return _not_text(key, raw)
            if not raw[key].strip():
                return f"`{key}` is empty: there is nothing to learn from"
        return {
            "messages": [
                {"role": "user", "content": raw["prompt"]},
                {"role": "assistant", "content": raw["completion"]},
            ]
        }
    if "text" in raw:
        if not isinstance(raw["text"], str):
            return _not_text("text", raw)
        return {"text": raw["text"]} if raw["text"].strip() else "`text` is empty"
    return f"has {', '.join(f'`{k}`' for k in raw) or 'no keys'}; a row needs {SHAPES}"


def _check_messages(messages: Any) -> Row | str:
    if not isinstance(messages, list) or not messages:
        return "`messages` must be a list with at least one message"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} must be an object with `role` and `content`"
        if message.get("role") not in ROLES:
            return f"message {number}: `role` is {message.get('role')!r}, not {' | '.join(ROLES)}"
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"message {number}: {_not_text('content', message)}"
    spoken = (m for m in messages if m["role"] == "assistant")
    if not any((m.get("content") or "").strip() or m.get("tool_calls") for m in spoken):
        return "nothing to learn from: no assistant message with text"
    return {"messages": messages}


def _not_text(key: str, raw: dict) -> str:
    return f"`{key}` must be text, not {_kind(raw[key])}" if key in raw else f"`{key}` is missing"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
