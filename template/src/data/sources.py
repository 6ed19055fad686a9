"""Raw rows of files and hub datasets, each with its place: the file and the line.

`datasets` reads JSON too, but reports neither file nor line, and turns a missing key into None.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from src.data import Rejected
from src.utils.environment import PROJECT_ROOT, from_root
from src.utils.errors import UserError, first_line

Places = Iterator[tuple[str, Any]]  # pairs of a place in the file (":3" is its line) and a raw row
COMPRESSED = {".gz", ".zst"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")  # org/name[:configuration][:split]


def expand(sources: str | list[str]) -> list[str]:
    """Return files and hub ids one by one, with a pattern such as data/*.jsonl as its files.

    Raises:
        UserError: no file fits a pattern.
    """
    names: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        files = [source]
        if re.search(r"[*?[]", source) and not os.path.exists(from_root(source)):
            files = sorted(glob(os.path.expanduser(source), root_dir=PROJECT_ROOT, recursive=True))
        if not files:
            raise UserError(f"{source}: no file fits this pattern")
        names += files
    return names


def raw_rows(source: str) -> Places:
    """Yield every row of one source with its place, as it stands there, or why it is `Rejected`.

    Raises:
        UserError: the whole file cannot be read, or there is no such dataset.
    """
    reader = reader_of(source)
    rows = reader(from_root(source)) if reader else _table(_load_hub(source))
    try:
        for place, row in rows:
            yield f"{source}{place}", row
    except Exception as error:  # noqa: BLE001 - whatever a library raises for a damaged file
        raise UserError(f"{source}: cannot be read: {first_line(error)}") from None


def fingerprint(source: str) -> bytes:
    """Return a hash of what a source holds."""
    if reader_of(source) is None:
        return _load_hub(source)._fingerprint.encode()
    path = from_root(source)
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").digest()
    return "".join(path.suffixes).encode() + content  # which decide how the bytes are read


def _load_hub(source: str) -> Any:
    """Return a split of a dataset on the hub, or in its cache: `org/name[:configuration][:split]`.

    Raises:
        UserError: there is no such dataset or split, or this process may not see it.
    """
    from datasets import load_dataset

    name, *more = source.split(":")
    configuration, split = more[:-1], more[-1] if more else "train"
    try:
        return load_dataset(name, *configuration, split=split)
    except (OSError, ValueError) as error:
        help_text = "name:configuration:split of the hub; a private one needs HF_TOKEN in .env"
        raise UserError(f"{source}: {first_line(error)} ({help_text})") from None


def reader_of(source: str) -> Callable[[Path], Places] | None:
    """Return what reads a file of this kind; None for a dataset on the hub.

    Raises:
        UserError: the source is neither.
    """
    path = from_root(source)
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    reader = READERS.get(plain.suffix.lower())
    if reader is None and (os.path.exists(path) or not HUB_ID.fullmatch(source)):
        raise UserError(f"{source}: neither a {', '.join(READERS)} file nor a hub id")
    return reader


def _open(path: Path) -> Any:
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path)))


def _jsonl(path: Path) -> Places:
    # As bytes: one that is not UTF-8 then names its own line, not the whole file.
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = Rejected(f"not valid JSON: {error}")
            yield f":{number}", row


def _json(path: Path) -> Places:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig").lstrip()
    if text.startswith("["):
        yield from ((f": row {number}", row) for number, row in enumerate(json.loads(text), 1))
    else:  # a row a line, whatever the file's name says
        yield from _jsonl(path)


def _csv(path: Path) -> Places:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        sign = max(",;\t", key=header.count)
        # strict: else a quote that is never closed swallows the rest of the file.
        reader = csv.DictReader(chain([header], file), delimiter=sign, strict=True)
        line = 1  # where the row begins
        try:
            names = [name or f"(column {n})" for n, name in enumerate(reader.fieldnames or (), 1)]
            if len({*names}) < len(names):
                raise csv.Error(f"two columns have the same name: {names}")
            reader.fieldnames, line = names, reader.line_num + 1
            for row in reader:
                if None in row:
                    row = Rejected("more cells than the header has; quote those with a comma")
                yield f":{reader.line_num}", row
                line = reader.line_num + 1
        except csv.Error as error:
            yield f":{line}", Rejected(f"not valid CSV from this line on: {error}")


def _parquet(path: Path) -> Places:
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
    yield from _table(
        dict(zip(batch.schema.names, cells, strict=True))
        for batch in batches
        for cells in zip(*map(_cells, batch.columns), strict=True)
    )


def _cells(column: Any) -> list[Any]:
    """Return a column's values; nothing where Python has none for them: a date after 9999."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, LookupError):
        return [None] * len(column)


def _table(rows: Iterable[Any]) -> Places:
    """Yield the rows of a table, without the nulls that Arrow fills in for keys of other rows."""
    for number, row in enumerate(rows, 1):
        yield f": row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


READERS = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip
