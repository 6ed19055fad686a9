"""Turn raw rows of any common shape into conversations or texts; name or leave out the others."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from src.config import DataConfig
from src.data import Rejected
from src.data.sources import check_exists, is_file, raw_rows, reason_of
from src.utils.errors import UserError

MAX_PROBLEMS = 20  # different ones of a source: enough to see a pattern, few enough to read
MAX_BAD_ROWS = 1000  # of a source: reading stops there
FIRST_ROWS = 100  # what is looked at before a start
ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"},
    **{"function": "tool", "observation": "tool", "function_response": "tool"},
    **{"function_call": "assistant"},
}
# Columns of a question and its answer, as datasets call them; the first pair that is there counts.
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer")),
    *(("instruction", "output"), ("instruction", "response"), ("question", "response")),
)
# Columns that continue a question: Alpaca's input, Dolly's and SQL sets' context.
CONTINUED = {"instruction": ("input", "context"), "question": ("context",), "prompt": ("context",)}
SYSTEM = ("system", "system_prompt")
CONVERSATIONS = ("messages", "conversations", "conversation")
SHAPES = "`messages`, `prompt` and `completion`, `instruction` and `output`, or `text`"
THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

# A row as `read_rows` yields it: {"messages": [...], "tools": [...]} or {"text": "..."}, with its
# "place", the shape that it was "read_as" and its "unread" columns, for messages to the user.
Row = dict[str, Any]


@dataclass
class Tally:
    """The rows that are left out, each with its reason."""

    empty: list[dict[str, str]] = field(default_factory=list)  # nothing to learn from
    unusable: list[dict[str, Any]] = field(default_factory=list)  # named, or left out: bad_rows
    too_long: list[dict[str, str]] = field(default_factory=list)  # no answer within max_length
    problems: dict[str, list[str]] = field(default_factory=dict)  # places of each, bad_rows=stop

    def reject(self, error: Rejected, place: str, row: Any, data: DataConfig) -> None:
        """Leave a row out.

        Raises:
            UserError: with data.bad_rows=stop, once there are too many of them.
        """
        if error.empty:
            self.empty.append({"place": place, "reason": f"nothing to learn from: {error}"})
            return
        kept = {} if isinstance(row, Rejected) else {"row": row}
        self.unusable.append({"place": place, "reason": str(error), **kept})
        if data.bad_rows == "stop":
            self.problems.setdefault(str(error), []).append(place)
            if len(self.problems) >= MAX_PROBLEMS or len(self.unusable) >= MAX_BAD_ROWS:
                self.check(f"stopped reading after {len(self.unusable):,} bad rows")

    def check(self, *more: str) -> None:
        """Raise a `UserError` if there are problems: each once, with its first place."""
        lines = []
        for reason, places in self.problems.items():
            rows = f" ({len(places):,} rows; data.bad_rows=skip leaves them out)"
            lines.append(f"{places[0]}: {reason}{rows if len(places) > 1 else ''}")
        if lines:
            raise UserError(*lines, *more)

    def reason_for_none(self) -> str | None:
        """Say that all rows are left out, with the first one's reason; None if none is."""
        for first in self.unusable + self.empty:
            return f"no row can be used; {first['place']}: {first['reason']}"
        return None


def adapt(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn a row of your own shape into one that training reads: this function is yours to edit.

    Args:
        raw: a row as it stands in the file.

    Returns:
        The row with `messages`, with `prompt` and `completion`, or with `text`.
    """
    return raw


def check_source(key: str, source: str, data: DataConfig) -> None:
    """Look at a local file and its first rows, before anything heavy is imported.

    All rows are read when they are tokenised; of a hub dataset only the name is looked at here.

    Raises:
        UserError: the file is missing or empty, or rows cannot be used: file, line and reason.
    """
    check_exists(key, source)
    tally = Tally()
    if not is_file(source):
        return
    rows = list(islice(read_rows(source, data, tally), FIRST_ROWS))
    tally.check()
    if not rows:
        reason = tally.reason_for_none() or f"no rows; {key} needs at least one of {SHAPES}"
        raise UserError(f"{source}: {reason}")


def read_rows(source: str, data: DataConfig, tally: Tally | None = None) -> Iterator[Row]:
    """Yield the usable rows of a file or hub dataset, in order, one at a time.

    Rows without anything to learn from are left out and counted.

    Args:
        source: one file or hub id.
        data: how rows are read: `columns`, `thinking`, `bad_rows`.
        tally: counts what was left out.

    Raises:
        UserError: after the last row, or after too many bad ones: a line per problem. Not with
            `bad_rows: skip`, which puts them into the tally.
    """
    tally = tally or Tally()
    for place, raw in raw_rows(source):
        try:
            yield _read(raw, data) | {"place": f"{source}{place}"}
        except Rejected as error:
            tally.reject(error, f"{source}{place}", raw, data)
    tally.check()


def read_question(raw: Any, data: DataConfig) -> Row:
    """Return what a row asks: its `messages` up to an answer at the end and `tools`, or its `text`.

    Raises:
        Rejected: the row cannot be used, or has no question.
    """
    row = _read(raw, data, answered=False)
    if "text" in row:
        return {"text": row["text"]}
    messages = row["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise Rejected(f"has no question; a row needs {SHAPES.rpartition(',')[0]}")
    return {"messages": messages, "tools": row["tools"]}


def _read(raw: Any, data: DataConfig, answered: bool = True) -> Row:
    """Return the row in one of its two forms.

    Args:
        raw: as it stands in its file.
        data: how rows are read.
        answered: whether it must have an answer.

    Raises:
        Rejected: the row cannot be used.
    """
    if isinstance(raw, Rejected):
        raise raw
    if not isinstance(raw, dict):
        raise Rejected(f"a row is an object with {SHAPES}, not {_kind(raw)}")
    columns = data.columns or {}
    for ours, theirs in columns.items():
        if theirs not in raw:
            raise Rejected(f"data.columns.{ours}: no column `{theirs}`; it has {_names(raw)}")
        raw = raw | {ours: raw[theirs]}
    try:
        row = {key: value for key, value in adapt(raw).items() if not _is_absent(value)}
    except Exception as error:  # noqa: BLE001 - the user's code, on this row
        raise Rejected(f"adapt() in src/data/rows.py: {type(error).__name__}: {error}") from None
    if row.get("label") is False:  # KTO's
        raise Rejected("`label` is false: an answer that was rejected", empty=True)
    shape = _shape(row, answered)
    used = {*shape, *columns.values(), *SYSTEM, "tools", "label"}
    if shape == ("text",):
        read: Row = {"text": _text(row, "text")}
    else:
        turns = row[shape[0]]
        if len(shape) == 2:
            turns = _turns(*shape, row, answered)
            used |= {"history", *CONTINUED.get(shape[0], ())}
        read = _conversation(" and ".join(shape), turns, row, data, answered)
    _check_writable(read)
    unread = [name for name in row if name not in used]
    return read | {"read_as": " and ".join(shape), "unread": unread}


def _shape(row: Row, answered: bool) -> tuple[str, ...]:
    """Return the columns that a row is read from: a conversation, a pair, or a text."""
    for key in CONVERSATIONS:
        if key in row:
            return (key,)
    for asked, answer in PAIRS:
        if asked in row and (answer in row or not answered):
            return asked, answer
    if "text" in row:
        return ("text",)
    for name, other in [*PAIRS, *(pair[::-1] for pair in PAIRS)]:
        if name in row:
            raise Rejected(f"`{other}` is missing; it has {_names(row)}")
    names = "for other names set data.columns.prompt=… and data.columns.completion=…"
    raise Rejected(f"has {_names(row)}; a row needs {SHAPES}; {names}")


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise Rejected(f"`{key}` must be text, not {_kind(row[key])}")
    if not row[key].strip():
        raise Rejected(f"`{key}` is empty", empty=True)
    return row[key]


def _turns(asked: str, answer: str, row: Row, answered: bool) -> list[Any]:
    """Return a question and its answer, each a text or a list of messages, as messages."""
    turns: list[Any] = []
    history = row.get("history") or []  # Alpaca's: pairs of a question and its answer
    for earlier in history if isinstance(history, list) else [history]:
        if not (isinstance(earlier, list) and [type(text) for text in earlier] == [str, str]):
            raise Rejected("`history` must be a list of [question, answer]")
        question, said = earlier
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    roles = {asked: "user", answer: "assistant"} if answered else {asked: "user"}
    for key, role in roles.items():
        if isinstance(row[key], list):
            turns += row[key]
            continue
        text = _text(row, key)
        for name in CONTINUED.get(key, ()):
            more = row.get(name) or ""
            if not isinstance(more, str):
                raise Rejected(f"`{name}` must be text, not {_kind(more)}")
            if more.strip():
                text = f"{text}\n\n{more}"
        turns.append({"role": role, "content": text})
    return turns


def _conversation(key: str, turns: Any, row: Row, data: DataConfig, answered: bool) -> Row:
    """Return a row's messages, with its system prompt as the first of them, and its tools."""
    if not isinstance(turns, list) or not turns:
        raise Rejected(f"`{key}` must be a list with at least one message")
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(read_message(turn, data))
        except Rejected as error:
            raise Rejected(f"message {number}: {error}") from None
    for name in SYSTEM:
        if isinstance(system := row.get(name), str) and system.strip():
            first = messages[0]
            if first["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            elif first["content"] != system:
                raise Rejected(f"has both `{name}` and a system message; keep one of them")
    spoken = (m for m in messages if m["role"] == "assistant" and trains(m))
    if answered and not any(m["content"].strip() or m.get("tool_calls") for m in spoken):
        raise Rejected("no assistant message with text", empty=True)
    tools = _parsed("`tools`", row.get("tools"))
    if not isinstance(tools, list | None) or not all(isinstance(t, dict) for t in tools or ()):
        raise Rejected(f"`tools` must be a list of objects, not {_kind(tools)}")
    return {"messages": messages, "tools": tools or None}


def trains(message: dict[str, Any]) -> bool:
    """Whether an assistant's message carries loss: OpenAI's `weight`, axolotl's `train`."""
    off = (message.get("train"), message.get("trainable"))
    return message.get("weight") != 0 and False not in off


def read_message(turn: Any, data: DataConfig) -> dict[str, Any]:
    """Return a message with `role` and text as `content`.

    Raises:
        Rejected: it has no known role, or its content is no text.
    """
    if not isinstance(turn, dict):
        raise Rejected(f"must be an object with `role` and `content`, not {_kind(turn)}")
    turn = {k: v for k, v in turn.items() if not _is_absent(v)}  # Parquet fills what a row lacks
    for key in ("weight", "train", "trainable"):
        if turn.get(key, 1) not in (0, 1):  # true and false equal them
            raise Rejected(f"`{key}` must be 0 or 1, or true or false, not {turn[key]!r}"[:120])
    sharegpt = turn.pop("from", None)  # ShareGPT's names
    name = turn.get("role", sharegpt)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Rejected(f"`role` is {repr(name)[:80]}, not {' | '.join(list(ROLES)[:4])}")
    content = turn.get("content", turn.pop("value", None))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise Rejected("`content` has parts that are no text, such as images")
        content = "".join(parts)
    calls = turn.pop("tool_calls", None)
    if function := turn.pop("function_call", None):  # OpenAI's old form
        calls = [{"function": function}]
    elif name == "function_call":  # ShareGPT's: the call is the message
        calls, content = [content], ""
    if calls:
        turn["tool_calls"], content = _calls(calls), content or ""
    if not isinstance(content, str):
        wrong = "is missing" if content is None else f"must be text, not {_kind(content)}"
        raise Rejected(f"`content` {wrong}")
    if data.thinking == "drop" and role == "assistant":
        content = THINKING.sub("", content)
        turn = {k: v for k, v in turn.items() if k not in {"reasoning_content", "thinking"}}
    return turn | {"role": role, "content": content}


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Return calls of tools with their arguments as objects; any part may be JSON text."""
    calls, read = _parsed("`tool_calls`", calls), []
    for call in calls if isinstance(calls, list) else [calls]:
        around = _parsed("a call of a tool", call)
        function = around.get("function", around) if isinstance(around, dict) else None
        function = _parsed("a call of a tool", function)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            seen = json.dumps(call, default=str)[:80]
            raise Rejected(f"a call of a tool needs `name` and `arguments`, and is {seen}")
        name = function["name"]
        arguments = _parsed(f"the arguments of `{name}`", function.get("arguments"))
        if not isinstance(arguments, dict | None):
            raise Rejected(f"the arguments of `{name}` must be an object, not {_kind(arguments)}")
        kept = around if "function" in around else {}
        function = {**function, "arguments": arguments or {}}
        read.append({"type": "function", **kept, "function": function})
    return read


def _parsed(what: str, value: Any) -> Any:
    """Return the value of a JSON text, and other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{what}: {reason_of(error)}; it is {value[:80]}") from None


def _check_writable(row: Row) -> None:
    """Raise `Rejected` for what no tokenizer or template can take, although JSON can hold it."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:
        raise Rejected(f"holds {reason_of(error)}") from None


def _is_absent(value: Any) -> bool:
    """Whether a cell is empty: pandas writes NaN where it has nothing."""
    return value is None or (isinstance(value, float) and value != value)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in row) or "no columns"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
