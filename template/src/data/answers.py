"""Answer the rows of a file: in order, each once, in constant memory, whenever it is stopped."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import batched, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.config import DataConfig
from src.data import Rejected
from src.data.rows import Row, read_question
from src.data.sources import check_exists, raw_rows
from src.utils.errors import UserError

ANSWER = "generated"  # the column that answers are written to, beside a row's own
AT_ONCE = 128  # rows: sorted by length among themselves, and what a stop may cost


def check_answers(source: str, output: Path, data: DataConfig) -> tuple[int, int]:
    """Read all rows of a file, and what was answered before; (answered, all) rows.

    Raises:
        UserError: a row asks nothing, or the output holds answers to other rows.
    """
    check_exists("--input", source)
    total = sum(1 for _ in _rows(source, data))
    if not output.exists():
        return 0, total
    done = whole = 0
    with output.open("rb") as file:
        for (row, _), line in zip(_rows(source, data), file, strict=False):
            if not line.endswith(b"\n"):  # cut off when it was written
                break
            try:
                same = {**json.loads(line), ANSWER: None} == {**row, ANSWER: None}
            except (ValueError, TypeError):
                same = False
            if not same:
                raise UserError(
                    f"{output}:{done + 1}: no answer to row {done + 1} of {source}; give another "
                    "--output"
                )
            done, whole = done + 1, whole + len(line)
        file.seek(whole)
        rest = file.read()
    if rest.count(b"\n"):
        raise UserError(f"{output}: has more lines than {source} has rows; give another --output")
    os.truncate(output, whole)
    return done, total


def answer_rows(
    source: str, output: Path, data: DataConfig, done: int, total: int,
    answer: Callable[[list[Any]], list[str]],
) -> None:  # fmt: skip
    """Append an answer to each row after the first `done` ones, some at a time."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file, tqdm(total=total, initial=done) as bar:
        for some in batched(islice(_rows(source, data), done, None), AT_ONCE):
            answers = answer([prompt for _, prompt in some])
            for (row, _), text in zip(some, answers, strict=True):
                file.write(json.dumps(row | {ANSWER: text}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(some))


def _rows(source: str, data: DataConfig) -> Iterator[tuple[dict[str, Any], Row]]:
    """Each row, and what it asks."""
    for place, raw in raw_rows(source):
        try:
            yield raw, read_question(raw, data)
        except Rejected as error:
            raise UserError(f"{source}{place}: {error}") from None
