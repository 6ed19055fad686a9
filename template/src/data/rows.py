"""Raw rows of any common shape become conversations or texts; what cannot is named, or left out."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from src.config import DataConfig
from src.data.sources import Unreadable, check_exists, is_file, raw_rows
from src.utils.errors import UserError

MAX_PROBLEMS = 20  # of one source: enough to see a pattern, few enough to read
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


class Empty(str):
    """Why there is nothing to learn from a row."""

    __slots__ = ()


@dataclass
class Tally:
    """Which rows were left out, and why."""

    empty: list[dict[str, str]] = field(default_factory=list)  # nothing to learn from
    unusable: list[dict[str, Any]] = field(default_factory=list)  # with data.bad_rows=skip
    too_long: list[dict[str, str]] = field(default_factory=list)  # no answer within max_length

    def why_nothing_is_left(self) -> str | None:
        """That all rows were left out, and why the first one; None if none was."""
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
    if is_file(source) and not list(islice(read_rows(source, data, tally), FIRST_ROWS)):
        why = tally.why_nothing_is_left() or f"no rows; {key} needs at least one of {SHAPES}"
        raise UserError(f"{source}: {why}")


def read_rows(source: str, data: DataConfig, tally: Tally | None = None) -> Iterator[Row]:
    """Yield the usable rows of a file or hub dataset, in order, one at a time.

    Rows without anything to learn from are left out and counted.

    Args:
        source: one file or hub id.
        data: how rows are read: `columns`, `thinking`, `bad_rows`.
        tally: counts what was read.

    Raises:
        UserError: after the last row, or the twentieth bad one: a line per bad row. Not with
            `bad_rows: skip`, which puts them into the tally.
    """
    tally, problems = tally or Tally(), []
    for place, raw in raw_rows(source):
        row = raw if isinstance(raw, Unreadable) else _read(raw, data)
        if isinstance(row, Empty):
            tally.empty.append(
                {"place": f"{source}{place}", "reason": f"nothing to learn from: {row}"}
            )
        elif not isinstance(row, Unreadable):
            yield row | {"place": f"{source}{place}"}
        elif data.bad_rows == "skip":
            kept = {} if isinstance(raw, Unreadable) else {"row": raw}
            tally.unusable.append({"place": f"{source}{place}", "reason": str(row), **kept})
        else:
            problems.append(f"{source}{place}: {row}")
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"{source}: stopped reading after {MAX_PROBLEMS} bad rows")
            break
    if problems:
        raise UserError(*problems)


def read_question(raw: Any, data: DataConfig) -> Row | Unreadable:
    """What a row asks, as training reads it: `messages` up to an answer at the end, and `tools`."""
    row = raw if isinstance(raw, Unreadable) else _read(raw, data, answered=False)
    if isinstance(row, Unreadable | Empty):
        return Unreadable(row)
    messages = row.get("messages", [])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        return Unreadable(f"asks nothing; a row needs {SHAPES.rpartition(',')[0]}")
    return {"messages": messages, "tools": row["tools"]}


def _read(raw: Any, data: DataConfig, answered: bool = True) -> Row | Unreadable | Empty:
    """The row in one of its two forms, or what is wrong with it.

    Args:
        raw: as it stands in its file.
        data: how rows are read.
        answered: whether it must have an answer.
    """
    if not isinstance(raw, dict):
        return Unreadable(f"a row is an object with {SHAPES}, not {_kind(raw)}")
    for ours, theirs in (data.columns or {}).items():
        if theirs not in raw:
            return Unreadable(f"data.columns.{ours}: no column `{theirs}`; it has {_names(raw)}")
        raw = raw | {ours: raw[theirs]}
    try:
        row = {key: value for key, value in adapt(raw).items() if not _is_absent(value)}
    except Exception as error:  # noqa: BLE001 - the user's code, on this row
        return Unreadable(f"adapt() in src/data/rows.py: {type(error).__name__}: {error}")
    if row.get("label") is False:  # KTO's
        return Empty("`label` is false: an answer that was rejected")
    read = _in_form(row, data, answered)
    if isinstance(read, dict):
        used = {*read.pop("used"), *(data.columns or {}).values(), *SYSTEM, "tools", "label"}
        read["unread"] = [name for name in row if name not in used]
    return read


def _in_form(row: Row, data: DataConfig, answered: bool) -> Row | Unreadable | Empty:
    """The row, with the columns that were `used` for it."""
    for key in CONVERSATIONS:
        if key in row:
            return _conversation(key, row[key], row, data, answered, {key})
    for asked, answer in PAIRS:
        if asked in row and (answer in row or not answered):
            return _pair(asked, answer, row, data, answered)
    if "text" in row:
        if not isinstance(row["text"], str):
            return Unreadable(f"`text` must be text, not {_kind(row['text'])}")
        read = {"text": row["text"], "read_as": "text", "used": {"text"}}
        return read if row["text"].strip() else Empty("`text` is empty")
    lonely = next((pair for pair in PAIRS for name in pair if name in row), ())
    for name in lonely:
        if name not in row:
            return Unreadable(f"`{name}` is missing; it has {_names(row)}")
    return Unreadable(f"has {_names(row)}; a row needs {SHAPES}; data.columns maps other names")


def _pair(
    asked: str, answer: str, row: Row, data: DataConfig, answered: bool
) -> Row | Unreadable | Empty:
    """A question and its answer, each a text or a list of messages, as a conversation."""
    turns: list[Any] = []
    history = row.get("history") or []  # Alpaca's: pairs of a question and its answer
    for earlier in history if isinstance(history, list) else [history]:
        if not (isinstance(earlier, list) and [type(text) for text in earlier] == [str, str]):
            return Unreadable("`history` must be a list of [question, answer]")
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), earlier, strict=True)
        ]
    for key, role in ((asked, "user"), (answer, "assistant")):
        value = row.get(key)
        if key == answer and not answered:
            continue
        if isinstance(value, list):
            turns += value
            continue
        if not isinstance(value, str):
            return Unreadable(f"`{key}` must be text, not {_kind(value)}")
        if not value.strip():
            return Empty(f"`{key}` is empty")
        for name in CONTINUED.get(key, ()):
            more = row.get(name) or ""
            if not isinstance(more, str):
                return Unreadable(f"`{name}` must be text, not {_kind(more)}")
            value = f"{value}\n\n{more}" if more.strip() else value
        turns.append({"role": role, "content": value})
    used = {asked, answer, "history", *CONTINUED.get(asked, ())}
    return _conversation(f"{asked} and {answer}", turns, row, data, answered, used)


def _conversation(
    key: str, turns: Any, row: Row, data: DataConfig, answered: bool, used: set[str]
) -> Row | Unreadable | Empty:
    if not isinstance(turns, list) or not turns:
        return Unreadable(f"`{key}` must be a list with at least one message")
    messages = []
    for number, turn in enumerate(turns, 1):
        message = read_message(turn, data)
        if isinstance(message, str):
            return Unreadable(f"message {number}{message}")
        messages.append(message)
    for name in SYSTEM:
        if isinstance(system := row.get(name), str) and system.strip():
            first = messages[0]
            if first["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            elif first["content"] != system:
                return Unreadable(f"has both `{name}` and a system message; keep one of them")
    spoken = (m for m in messages if m["role"] == "assistant" and trains(m))
    if answered and not any(m["content"].strip() or m.get("tool_calls") for m in spoken):
        return Empty("no assistant message with text")
    tools = row.get("tools")
    try:
        tools = json.loads(tools or "null") if isinstance(tools, str) else tools
    except ValueError as error:
        return Unreadable(f"`tools` is not valid JSON: {getattr(error, 'msg', error)}")
    if not isinstance(tools, list | None) or not all(isinstance(t, dict) for t in tools or ()):
        return Unreadable(f"`tools` must be a list of objects, not {_kind(tools)}")
    return {"messages": messages, "tools": tools or None, "read_as": key, "used": used}


def trains(message: dict[str, Any]) -> bool:
    """Whether an assistant's message carries loss: OpenAI's `weight`, axolotl's `train`."""
    off = (message.get("train"), message.get("trainable"))
    return message.get("weight") != 0 and False not in off


def read_message(turn: Any, data: DataConfig) -> dict[str, Any] | str:
    """A message with `role` and text as `content`, or what is wrong with it."""
    if not isinstance(turn, dict):
        return " must be an object with `role` and `content`"
    turn = {k: v for k, v in turn.items() if not _is_absent(v)}  # Parquet fills what a row lacks
    said = turn.pop("from", None)  # ShareGPT's names
    role = ROLES.get(named) if isinstance(named := turn.get("role", said), str) else None
    if role is None:
        return f": `role` is {named!r}, not {' | '.join(list(ROLES)[:4])}"
    content = turn.get("content", turn.pop("value", None))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            return ": `content` has parts that are no text, such as images"
        content = "".join(parts)
    if call := turn.pop("function_call", None):  # OpenAI's old form
        turn["tool_calls"] = [{"type": "function", "function": call}]
    elif named == "function_call":  # ShareGPT's: the call is the message
        turn["tool_calls"], content = [content], ""
    if turn.get("tool_calls"):
        calls, content = _calls(turn["tool_calls"]), content or ""
        if isinstance(calls, str):
            return f": {calls}"
        turn["tool_calls"] = calls
    if not isinstance(content, str):
        wrong = "is missing" if content is None else f"must be text, not {_kind(content)}"
        return f": `content` {wrong}"
    if data.thinking == "drop" and role == "assistant":
        content = THINKING.sub("", content)
        turn = {k: v for k, v in turn.items() if k not in {"reasoning_content", "thinking"}}
    if "tool_calls" in turn and not turn["tool_calls"]:  # some templates test for the key
        del turn["tool_calls"]
    return turn | {"role": role, "content": content}


def _calls(calls: Any) -> list[dict[str, Any]] | str:
    """Calls of tools, their arguments as objects; or what is wrong with one."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        try:
            call = json.loads(call) if isinstance(call, str) else call
            function = call.get("function", call)
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                arguments = json.loads(arguments) if arguments.strip() else {}
            name, arguments = function["name"], {} if arguments is None else arguments
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            what = f"not valid JSON ({error})" if isinstance(error, ValueError) else "no name"
            return f"a call of a tool has {what}: {str(call)[:80]}"
        if not isinstance(arguments, dict):
            return f"the arguments of `{name}` must be an object, not {_kind(arguments)}"
        around = call if "function" in call else {}
        function = {**function, "arguments": arguments}
        found.append({"type": "function", **around, "function": function})
    return found


def _is_absent(value: Any) -> bool:
    """Whether a cell is empty: pandas writes NaN where it has nothing."""
    return value is None or (isinstance(value, float) and value != value)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in row) or "no columns"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
