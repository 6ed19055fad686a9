"""Turn raw rows of any common shape into conversations or texts; name or leave out the others."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from src.config import DataConfig
from src.data import EMPTY, UNUSABLE, Rejected
from src.data.sources import expand, raw_rows, reader_of
from src.utils.errors import UserError, first_line

MAX_PROBLEMS = 20  # that are printed: enough to see a pattern, few enough to read
MANY_ROWS = 1000  # after each so many rows left out, check for unusable ones
FIRST_ROWS = 100  # usable rows that are read before torch is imported
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
SHAREGPT = {"from": "role", "value": "content"}
LOSS = ("weight", "train", "trainable")  # of a message: OpenAI's, axolotl's; 0 or false is no loss
# Columns that a row is read from, by datasets' names; the first shape that matches counts.
SHAPES = (
    ("messages",), ("conversations",), ("conversation",),
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("question", "response"), ("text",),
)  # fmt: skip
ANSWERS = {"completion", "response", "output", "answer"}  # a row to be answered may lack them
# Columns that continue a question: Alpaca's input, Dolly's and SQL sets' context.
CONTINUED = {"instruction": ("input", "context"), "question": ("context",), "prompt": ("context",)}
EXPECTED = "`messages`, `prompt` and `completion`, `instruction` and `output`, or `text`"
KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

# A row as `read_rows` yields it: {"messages": [...], "tools": [...]} or {"text": "..."}, with its
# "place", the shape that it was "read_as" and its "unread" columns, for messages to the user.
Row = dict[str, Any]


class LeftOut(NamedTuple):
    """A row that is left out: a line of `left_out.jsonl`."""

    count_as: str
    place: str
    reason: str
    row: Any


def check(left_out: list[LeftOut], data: DataConfig) -> None:
    """Raise an error for rows that cannot be used, unless `data.bad_rows` is `skip`.

    Raises:
        UserError: a line per problem, with its first place and how many rows have it.
    """
    problems: dict[str, list[str]] = {}
    for row in left_out:
        if row.count_as == UNUSABLE:
            # Reasons that differ in numbers only, such as that of a message, are one problem.
            kind = re.sub(r"\d+", "0", row.reason)
            problems.setdefault(kind, []).append(f"{row.place}: {row.reason}")
    if problems and data.bad_rows == "stop":
        count = " ({:,} rows; data.bad_rows=skip leaves them out)"
        lines = [rows[0] + count.format(len(rows)) * (len(rows) > 1) for rows in problems.values()]
        raise UserError(*lines[:MAX_PROBLEMS])


def no_rows(left_out: list[LeftOut]) -> str:
    """Say why no row remains, with the first one's reason."""
    if left_out:
        return f"no row can be used; {left_out[0].place}: {left_out[0].reason}"
    return f"no rows; at least one is needed, with {EXPECTED}"


def adapt(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn a row of your own shape into one that training reads: this function is yours to edit.

    Args:
        raw: a row as it stands in the file.

    Returns:
        The row with `messages`, with `prompt` and `completion`, or with `text`.
    """
    return raw


def check_sources(sources: str | list[str], data: DataConfig) -> None:
    """Look at the first rows of local files, before anything heavy is imported.

    All rows are read when they are tokenised; of a hub dataset only the name is looked at here.

    Raises:
        UserError: a file is missing or empty, or rows cannot be used: file, line and reason.
    """
    for source in filter(reader_of, expand(sources)):
        left_out: list[LeftOut] = []
        rows = [*islice(read_rows(source, data, left_out), FIRST_ROWS)]
        check(left_out, data)
        if not rows:
            raise UserError(f"{source}: {no_rows(left_out)}")


def read_rows(
    source: str, data: DataConfig, left_out: list[LeftOut] | None = None
) -> Iterator[Row]:
    """Yield the usable rows of a file or hub dataset, in order, one at a time.

    Args:
        source: one file or hub id.
        data: how rows are read: `columns`, `thinking`, `bad_rows`.
        left_out: takes the others.

    Raises:
        UserError: as `check`, after the last row, or after many that are left out.
    """
    left_out = [] if left_out is None else left_out
    for place, raw in raw_rows(source):
        try:
            yield read_row(raw, data) | {"place": place}
        except Rejected as error:
            left_out.append(LeftOut(error.count_as, place, str(error), raw))
            if len(left_out) % MANY_ROWS == 0:
                check(left_out, data)
    check(left_out, data)


def read_row(raw: Any, data: DataConfig, needs_answer: bool = True) -> Row:
    """Return the row in one of its two forms.

    Args:
        raw: as it stands in its file.
        data: how rows are read.
        needs_answer: whether it must have an answer. False: its columns of answers are not read.

    Raises:
        Rejected: the row cannot be used.
    """
    if isinstance(raw, Rejected):
        raise raw
    if not isinstance(raw, dict):
        raise Rejected(f"a row must be an object, not {type(raw).__name__}")
    columns = data.columns or {}
    mapped = {k: v for k, v in columns.items() if needs_answer or k not in ANSWERS}
    try:
        row = _present(adapt(raw | {ours: raw[theirs] for ours, theirs in mapped.items()}))
    except Exception as error:  # noqa: BLE001 - the user's code, on this row
        reason = f"data.columns, or adapt() in src/data/rows.py: {first_line(error)}"
        raise Rejected(f"{reason}; the row has {[*raw]}") from None
    needed = 1 + needs_answer  # columns of a shape
    # First the shapes of which data.columns names a part: the file's names may make up another one.
    shapes = sorted(SHAPES, key=columns.keys().isdisjoint)
    shape = next((shape for shape in shapes if row.keys() >= {*shape[:needed]}), None)
    if shape is None:
        raise Rejected(f"has {[*row]}; a row needs {EXPECTED}; data.columns maps other names")
    if shape != ("text",) and row.pop("label", True) is False:  # KTO's
        raise Rejected("`label` is false: an answer that was rejected", EMPTY)
    # Columns that are read are popped: the rest is unread.
    if shape == ("text",):
        read = {"text": _text(row, "text")}
    else:
        turns = _pair(shape[:needed], row) if len(shape) == 2 else row.pop(shape[0])
        read = _conversation(_of(list, turns, f"`{shape[0]}`"), row, data)
        spoken = [m for m in read["messages"] if m["role"] == "assistant" and carries_loss(m)]
        if needs_answer and not any(m["content"].strip() or m.get("tool_calls") for m in spoken):
            raise Rejected("no assistant message with text", EMPTY)
    try:  # what no tokenizer or template can take, although JSON can hold it
        json.dumps(read, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:
        raise Rejected(f"cannot be written as UTF-8: {error}") from None
    unread = [name for name in row if name not in columns.values()]
    return read | {"read_as": " and ".join(shape), "unread": unread}


def _text(row: Row, name: str) -> str:
    """Pop a column that must hold text."""
    text = _of(str, row.pop(name), f"`{name}`")
    if not text.strip():
        raise Rejected(f"`{name}` is empty", EMPTY)
    return text


def _pair(columns: tuple[str, ...], row: Row) -> list[Any]:
    """Return the turns of a question and its answer, each a text or messages."""
    turns: list[Any] = []
    for pair in _of(list, row.pop("history", None), "`history`"):  # Alpaca's
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected("`history` must be a list of [question, answer]")
        turns += map(_turn, ("user", "assistant"), pair)
    for name, role in zip(columns, ("user", "assistant"), strict=False):
        if isinstance(row[name], list):
            turns += row.pop(name)
            continue
        text = _text(row, name)
        for more in CONTINUED.get(name, ()):
            added = _of(str, row.pop(more, None) or "", f"`{more}`")
            text += f"\n\n{added}" if added.strip() else ""
        turns.append(_turn(role, text))
    return turns


def _conversation(turns: list[Any], row: Row, data: DataConfig) -> Row:
    """Return a row's messages, with its system prompt as the first of them, and its tools."""
    if not turns:
        raise Rejected("has no messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(read_message(turn, data))
        except Rejected as error:
            raise Rejected(f"message {number}: {error}") from None
    for name in ("system", "system_prompt"):
        if isinstance(system := row.pop(name, None), str) and system.strip():
            if messages[0]["role"] != "system":
                messages.insert(0, _turn("system", system))
            elif messages[0]["content"] != system:
                raise Rejected(f"has both `{name}` and a system message; keep one of them")
    tools = [_of(dict, tool, "a tool") for tool in _of(list, row.pop("tools", None), "`tools`")]
    return {"messages": messages, "tools": tools or None}


def carries_loss(message: dict[str, Any]) -> bool:
    """Whether an assistant's message carries loss."""
    return 0 not in (message.get(name) for name in LOSS)


def read_message(turn: Any, data: DataConfig) -> dict[str, Any]:
    """Return a message with `role` and text as `content`.

    Raises:
        Rejected: it has no known role, or its content is no text.
    """
    present = _present(_of(dict, turn, "it"))  # Parquet fills in missing keys with null
    turn = {SHAREGPT.get(key, key): cell for key, cell in present.items()}
    for key in LOSS:
        if turn.get(key, 1) not in (0, 1):  # true and false equal them
            raise Rejected(f"`{key}` must be 0 or 1, or true or false, not {turn[key]!r:.80}")
    name, content = str(turn.get("role")), turn.get("content")
    if name not in ROLES:
        raise Rejected(f"`role` is {name!r:.80}, not system, user, assistant or tool")
    role = ROLES[name]
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(_of(str, part, "each part of `content`") for part in parts)
    calls = turn.pop("tool_calls", None)
    if function := turn.pop("function_call", None):  # OpenAI's old form
        calls = [function]
    elif name == "function_call":  # ShareGPT's: the call is the message
        calls, content = [content], ""
    if calls:
        turn["tool_calls"], content = _calls(calls), content or ""
    content = _of(str, content, "`content`")
    if data.thinking == "drop" and role == "assistant":
        content = THINKING.sub("", content)
        for key in ("reasoning_content", "thinking"):
            turn.pop(key, None)
    return turn | _turn(role, content)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Return calls of tools with their arguments as objects."""
    read = []
    for call in _of(list, calls, "`tool_calls`"):
        whole = _of(dict, call, "a call of a tool")
        if "function" not in whole:
            whole = {"function": whole}
        function = _of(dict, whole["function"], "a call of a tool")
        _of(str, function.get("name"), "the `name` of a called tool")
        arguments = {"arguments": _of(dict, function.get("arguments"), "`arguments`")}
        read.append({"type": "function", **whole, "function": function | arguments})
    return read


def _of[Kind: (dict, list, str)](kind: type[Kind], value: Any, what: str) -> Kind:
    """Return a value that must be of this kind; objects and lists may be JSON text, or missing."""
    if kind is not str and isinstance(value, str):
        try:
            value = json.loads(value.strip() or "null")
        except (ValueError, RecursionError) as error:
            raise Rejected(f"{what}: not valid JSON: {error}; it is {value!r:.80}") from None
    if kind is not str and value is None:
        return kind()
    if not isinstance(value, kind):
        raise Rejected(f"{what} must be {KINDS[kind]}, not {type(value).__name__}")
    return value


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without its empty cells: pandas writes NaN where it has nothing."""
    return {k: v for k, v in row.items() if v is not None and v == v}
