"""Answer the rows of a file: in order, each once, in constant memory, whenever it is stopped."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from io import BytesIO
from itertools import batched, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.config import DataConfig
from src.data import Rejected
from src.data.rows import Row, read_row
from src.data.sources import raw_rows
from src.utils.environment import from_root
from src.utils.errors import UserError
from src.utils.files import write_problem

ANSWER = "generated"  # the column that answers are written to, beside a row's own
BY = "generated_by"  # the model and the options that wrote them
AT_ONCE = 128  # rows: sorted by length among themselves; a stop loses at most their answers


def check_answers(source: str, output: Path | None, data: DataConfig, by: str) -> tuple[int, int]:
    """Read all rows of a file and the answers that are there; (answered, all) rows.

    Raises:
        UserError: a row has no question, or the output holds answers to other rows, or those of
            another model or with other options.
    """
    file = from_root(source)
    if output and output.exists():
        if file.exists() and output.samefile(file):
            raise UserError(f"--output: {output} is the input; give another one")
    elif output and (problem := write_problem(output.parent)):
        raise UserError(f"--output: {problem}")
    done = whole = total = 0
    with output.open("r+b") if output and output.exists() else BytesIO() as file:
        for total, (start, _) in enumerate(_rows(source, data, by), 1):
            line, expected = file.readline(), start.encode()
            if not (line.startswith(expected) or expected.startswith(line)):
                place = f"{output}:{total}: not the answer of {by} to row {total} of {source}"
                raise UserError(f"{place}; give another --output")
            if line.endswith(b"\n"):  # else it was cut off when it was written
                done, whole = total, file.tell()
        if file.readline():
            raise UserError(f"{output}: more lines than {source} has rows; give another --output")
        file.truncate(whole)
    return done, total


def answer_rows(
    source: str, output: Path | None, data: DataConfig, by: str, done: int, total: int,
    answer: Callable[[list[Any]], list[str]],
) -> None:  # fmt: skip
    """Append each row after the first `done` to `output`, with its answer; without one, print."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    with (
        output.open("a", encoding="utf-8") if output else nullcontext(sys.stdout) as file,
        tqdm(total=total, initial=done) as bar,
    ):
        for some in batched(islice(_rows(source, data, by), done, None), AT_ONCE):
            answers = answer([question for _, question in some])
            for (start, _), text in zip(some, answers, strict=True):
                file.write(f"{start}{json.dumps(text, ensure_ascii=False)}}}\n")
            file.flush()
            bar.update(len(some))


def read_question(raw: Any, data: DataConfig) -> Row:
    """Return a row's question: `messages` without the last answers, and `tools`; or its `text`.

    Raises:
        Rejected: the row cannot be used, or has no question.
    """
    row = read_row(raw, data, needs_answer=False)
    messages = row.get("messages")
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if messages == []:
        raise Rejected("has no question")
    return row


def _rows(source: str, data: DataConfig, by: str) -> Iterator[tuple[str, Row]]:
    """Yield the line of each row, up to where its answer goes, and its question."""
    for place, raw in raw_rows(source):
        try:
            question = read_question(raw, data) | {"place": place}
            row = {name: value for name, value in raw.items() if name not in {ANSWER, BY}}
            line = json.dumps(row | {BY: by, ANSWER: ""}, ensure_ascii=False, default=str)
            line.encode()
        except ValueError as error:  # Rejected, or half of a character
            raise UserError(f"{place}: {error}") from None
        yield line.removesuffix('""}'), question
