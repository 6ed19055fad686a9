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
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.data import Rejected
from src.utils.environment import PROJECT_ROOT, from_root, to_root
from src.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Places = Iterator[tuple[str, Any]]  # pairs of a place in the file (":3" is its line) and a raw row
LONGEST_HEADER = 10_000  # characters; beyond them a quote in it is not closed
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")  # org/name[:configuration][:split]


def expand(sources: str | list[str]) -> list[str]:
    """Return files and hub ids one by one, with a pattern such as data/*.jsonl as its files.

    Raises:
        UserError: no file fits a pattern, or this cannot be a path.
    """
    names: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        try:
            path = from_root(source)
            exists = path.exists()
        except OSError as error:  # a name too long
            raise UserError(f"{source}: {reason_of(error)}") from None
        if exists or not any(sign in source for sign in "*?["):
            names.append(source)
            continue
        # A folder that exists is no pattern, whatever its name holds.
        folder = next(parent for parent in path.parents if parent.exists())
        files = sorted(glob(str(path.relative_to(folder)), root_dir=folder, recursive=True))
        if not files:
            raise UserError(f"{source}: no file fits this pattern")
        names += [to_root(folder / file) for file in files]
    return names


def is_file(source: str) -> bool:
    """Whether a source names a file rather than a dataset on the hub."""
    return _reader(Path(source)) is not None or from_root(source).exists()


def check_exists(key: str, source: str) -> None:
    """Check that a file is there; of a hub dataset only the name is looked at.

    Raises:
        UserError: it is not, or this is neither a file nor a hub id.
    """
    if not is_file(source):
        if not HUB_ID.fullmatch(source):
            share = ", nor a share such as 0.05" * (key == "data.eval")
            kinds = f"neither a {', '.join(READERS)} file nor a hub id{share}"
            raise UserError(f"{key}: {source}: {kinds}")
    elif not from_root(source).is_file():
        problem = f"no such file (paths are relative to the project, {PROJECT_ROOT})"
        if from_root(source).is_dir():
            problem = f"a folder; name the files in it, e.g. {source.rstrip('/')}/*.jsonl"
        raise UserError(f"{key}: {source}: {problem}")


def raw_rows(source: str) -> Places:
    """Yield every row of one source with its place, as it stands there, or why it is `Rejected`.

    Raises:
        UserError: the whole file cannot be read, or there is no such dataset.
    """
    path = from_root(source)
    reader = _reader(path)
    if reader is None and path.exists():
        raise UserError(f"{source}: {path.suffix or 'this'} is not one of {', '.join(READERS)}")
    try:
        yield from reader(path) if reader else _hub(source)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a library raises for a damaged file
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{source}{line}: cannot be read: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """Say in one line what a library could not read, and what it expected."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason}); save it as UTF-8"
    if isinstance(error, UnicodeEncodeError):
        half = error.object[error.start]
        return f"half of a character, {half!r}; text must be whole Unicode characters"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg.removesuffix(' at')}"
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply; fewer than 900 levels can be read"
    if "integer string conversion" in str(error):
        return "a number of more than 4,300 digits; write it as text"
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def fingerprint(source: str) -> bytes:
    """Return a hash of what a source holds."""
    if not is_file(source):
        return load_hub(source)._fingerprint.encode()
    path = from_root(source)
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").digest()
    return "".join(path.suffixes).encode() + content  # which decide how the bytes are read


def load_hub(source: str) -> "Dataset":
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
        reason = str(error).partition("\n")[0]
        if isinstance(error, OSError):
            reason = f"not found on the hub and not in its cache ({reason})"
            offline = "; HF_HUB_OFFLINE is set, so nothing is fetched"
            private = "; a private one needs HF_TOKEN in .env"
            reason += offline if os.environ.get("HF_HUB_OFFLINE") else private
        elif "onfig" in reason:  # a dataset of several configurations, not an unknown split
            reason += "; write name:configuration:split"
        raise UserError(f"{source}: {reason}") from None


def _reader(path: Path) -> Callable[[Path], Places] | None:
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return READERS.get(plain.suffix.lower())


def _open(path: Path) -> Any:
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


def _without_nulls(value: Any) -> Any:
    """Return a cell without the nulls that Arrow fills in for keys of other rows."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


def _jsonl(path: Path) -> Places:
    # As bytes: one that is not UTF-8 then names its own line, not the whole file.
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                row = Rejected(reason_of(error))
            yield f":{number}", row


def _json(path: Path) -> Places:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _jsonl(path)  # a row a line, whatever the file's name says
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f": row {number}", row


def _csv(path: Path) -> Places:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        lines, sign, before = _csv_header(file)
        # strict: else a quote that is never closed swallows the rest of the file.
        reader = csv.DictReader(chain(lines, file), delimiter=sign, strict=True)
        began = before + 1
        try:
            names = [name or f"(column {n})" for n, name in enumerate(reader.fieldnames or (), 1)]
            if double := [name for name in names if names.count(name) > 1]:
                yield f":{began}", Rejected(f"two columns are called {double[0]}")
                return
            reader.fieldnames, began = names, before + reader.line_num + 1
            top = began - 1
            for row in reader:
                if None in row:
                    row = Rejected(f"more cells than the header, line {top}, has; quote commas")
                yield f":{before + reader.line_num}", row
                began = before + reader.line_num + 1
        except csv.Error as error:
            yield f":{began}", Rejected(f"not valid CSV from this line on: {error}")


def _csv_header(file: Iterable[str]) -> tuple[list[str], str, int]:
    """Return the lines of the header, the separator, and how many lines stand before it."""
    before, sign, header = 0, "", ""
    for line in file:
        header += line
        if header.count('"') % 2 and len(header) < LONGEST_HEADER:  # a name has a line end
            continue
        if sep := re.fullmatch('"?sep=(.)"?\\s*', header):  # Excel's
            sign = sep[1]
        elif header.strip(",;\t \r\n"):
            break
        before, header = before + header.count("\n"), ""
    lines = list(io.StringIO(header, newline=""))
    columns = {s: len(next(csv.reader(lines, delimiter=s), [])) for s in "\t;,"}
    best = max(columns, key=columns.__getitem__)
    return lines, sign or (best if columns[best] > 1 else ","), before


def _hub(source: str) -> Places:
    for number, row in enumerate(load_hub(source), 1):
        yield f": row {number}", {name: _without_nulls(cell) for name, cell in row.items()}


def _parquet(path: Path) -> Places:
    import pyarrow.parquet as pq

    numbers = count(1)
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
        for cells in zip(*map(_cells, batch.columns), strict=True):
            yield f": row {next(numbers)}", dict(zip(batch.schema.names, cells, strict=True))


def _cells(column: Any) -> list[Any]:
    """Return a column's values; nothing where Python has none for them: a date after 9999."""
    try:
        return list(map(_without_nulls, column.to_pylist()))
    except (ValueError, OverflowError, LookupError):
        return [None] * len(column)


READERS = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip
