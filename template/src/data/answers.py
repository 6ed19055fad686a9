"""Answer the rows of a file: in order, each once, in constant memory, whenever it is stopped."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import batched, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.config import DataConfig
from src.data.rows import CONVERSATIONS, PAIRS, read_message
from src.data.sources import Unreadable, check_exists, raw_rows
from src.utils.errors import UserError

ANSWER = "generated"  # the column that answers are written to, beside a row's own
ASKING = tuple(dict.fromkeys(asked for asked, _ in PAIRS))
AT_ONCE = 128  # rows: sorted by length among themselves, and what a stop may cost


def check_answers(source: str, output: Path) -> tuple[int, int]:
    """Read all rows of a file, and what was answered before; (answered, all) rows.

    Raises:
        UserError: a row asks nothing, or the output holds answers to other rows.
    """
    check_exists("--input", source)
    total = sum(1 for _ in _rows(source))
    if not output.exists():
        return 0, total
    done = whole = 0
    with output.open("rb") as file:
        for (row, _), line in zip(_rows(source), file, strict=False):
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
    source: str, output: Path, done: int, total: int, answer: Callable[[list[Any]], list[str]]
) -> None:
    """Append an answer to each row after the first `done` ones, some at a time."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file, tqdm(total=total, initial=done) as bar:
        for some in batched(islice(_rows(source), done, None), AT_ONCE):
            answers = answer([prompt for _, prompt in some])
            for (row, _), text in zip(some, answers, strict=True):
                file.write(json.dumps(row | {ANSWER: text}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(some))


def _rows(source: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each row, and what it asks."""
    for place, raw in raw_rows(source):
        asked = raw if isinstance(raw, Unreadable) else _prompt(raw)
        if isinstance(asked, Unreadable):
            raise UserError(f"{source}{place}: {asked}")
        yield raw, asked


def _prompt(row: Any) -> list[dict[str, Any]] | Unreadable:
    """The conversation of a row up to the answer that it may have at its end."""
    if not isinstance(row, dict):
        return Unreadable("a row is an object with `messages` or `prompt`")
    data = DataConfig(train="-")
    for key in CONVERSATIONS:
        if row.get(key):
            messages: list[Any] = [read_message(turn, data) for turn in row[key]]
            for number, message in enumerate(messages, 1):
                if isinstance(message, str):
                    return Unreadable(f"message {number}{message}")
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages or Unreadable("asks nothing")
    for key in ASKING:
        if isinstance(text := row.get(key), str) and text.strip():
            more = str(row.get("input") or "") if key == "instruction" else ""
            return [{"role": "user", "content": f"{text}\n\n{more}" if more else text}]
    return Unreadable(f"asks nothing; a row needs `messages` or one of {', '.join(ASKING)}")
