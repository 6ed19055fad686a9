"""Render a conversation as one text, and find what the assistant says in it, for any template.

Chat templates trim and rewrite turns, drop earlier reasoning, and differ in how a turn ends. So
as little as possible is assumed: a conversation is rendered twice, once with a marker in place of
each message's text. What stands around the markers comes from the template, what stands in their
place from the row. The generation prompt is rendered once for each kind of
message that stands before an answer.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import Rejected
from src.data.rows import carries_loss

Message = dict[str, Any]
Span = tuple[int, int]  # of characters: start and end

MARK = re.compile(r"Qzx(\d+)xzQ")  # letters and digits: templates neither trim nor escape them
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK = {"name": "look", "description": "Look something up.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": LOOK}  # to see how a template writes one


class Rendered(NamedTuple):
    """A conversation as the model sees it."""

    text: str
    spans: list[Span]  # what the model has to produce
    prompted: bool  # whether the whole generation prompt stands before each span


def render(messages: list[Message], tools: list[dict] | None, tokenizer: Tokenizer) -> Rendered:
    """Return the conversation as one text, and the spans of it that carry loss.

    A span begins where the generation prompt would end, and ends with the token that ends the
    turn. It includes the reasoning that the template kept, the answer and tool calls, not headers.

    Raises:
        Rejected: the template refuses the conversation, leaves out or changes what the assistant
            says, or begins or ends its turn in another way than elsewhere.
    """
    if MARK.search(str(messages)):
        raise Rejected("the row holds text such as Qzx1xzQ, which is a marker here; change it")
    ends = turn_ends(tokenizer, str(tokenizer.chat_template))
    text, places, marked = _locate(messages, tools, tokenizer)
    spans, prompted, end = [], True, 0  # end: of the previous message
    for number, message in enumerate(messages):
        own, calls = places[number], message.get("tool_calls") or []
        if not own and MARK.search(marked[number]["content"]):
            raise Rejected(f"the chat template leaves out message {number + 1}")
        if message["role"] != "assistant" or not (own or calls):
            end = own[1] if own else end
            continue
        after = next((place[0] for place in places[number + 1 :] if place), len(text))
        prompt, begin = ends.header, end
        previous = messages[number - 1] if number else message
        place = places[number - 1] if number and not previous.get("tool_calls") else None
        if place or previous["role"] != "assistant":
            prompt = _prompt_before(number, marked, tools, tokenizer)
            begin = place[1] if place else end
        within = begin, own[0] if own else after
        start, whole = _beginning(text, within, prompt, place is not None, ends.special)
        end, is_last = own[1] if own else start, after == len(text)
        closing = (ends.of_calls if calls else ends.of_answers).search(text, end, after)
        if not closing and is_last:
            text += ends.appended
        end = closing.end() if closing else len(text) if is_last else end
        if not carries_loss(message):
            continue
        if not all(call["function"]["name"] in text[start:after] for call in calls):
            raise Rejected(f"the chat template leaves out the tool calls of message {number + 1}")
        if not (closing or is_last):
            raise Rejected(f"the chat template writes no end of turn after message {number + 1}")
        spans.append((start, end))
        prompted = prompted and whole
    return Rendered(text, spans, prompted)


def _beginning(
    text: str, within: Span, prompt: str, anchored: bool, special: re.Pattern[str]
) -> tuple[int, bool]:
    """Return where an answer begins, and whether the whole generation prompt stands before it.

    Args:
        text: of the conversation.
        within: where the answer's header and reasoning stand.
        prompt: what the template writes before an answer. Before earlier answers its last part,
            such as <think>, may be missing: templates drop it together with old reasoning.
        anchored: True: the prompt begins where `within` does. False: it is searched for.
        special: a pattern of the tokenizer's special tokens.
    """
    start, until = within
    if not anchored:
        # At least up to the role's name: less of it could match another role's header.
        role = re.search(rf"(?:{special.pattern})\w*", prompt)
        least = role.end() if role else len(prompt)
        sizes = range(len(prompt), least - 1, -1)
        places = (text.find(prompt[:size], start, until) for size in sizes)
        start = next((place for place in places if place >= 0), -1)
        if start < 0:  # Llama 3.1 with tools gives the first message a user's header
            raise Rejected("the chat template writes an answer without the header of its prompt")
    shared = len(_shared(text[start:until], prompt))
    start += shared
    for token in special.finditer(text, within[0], until):
        if token.start() < start < token.end():  # do not begin inside a special token
            start = token.start()
    return start, shared == len(prompt)


def _prompt_before(
    number: int, marked: list[Message], tools: list[dict] | None, tokenizer: Tokenizer
) -> str:
    """Return what the template writes between an answer and the message before it.

    Rendering all that comes before each answer would be quadratic in turns. So the prompt is
    rendered once, after the first message of the same kind, and cached.
    """
    kind = _kind(marked[number - 1])
    first = next(n for n, message in enumerate(marked) if _kind(message) == kind)
    last = marked[first]
    if not MARK.search(last["content"]):
        last = last | {"content": _mark(first) + last["content"]}
    return _skeleton([*marked[:first], last], tools, tokenizer, prompt=True)[-1]


def _kind(marked: Message) -> tuple[str, str, bool]:
    """Return a message's role, the blanks at its end, and whether it calls tools."""
    blanks = MARK.split(marked["content"])[-1]
    return marked["role"], blanks, bool(marked.get("tool_calls"))


def chat_text(
    tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool,
    tools: list[dict] | None = None,
) -> str:  # fmt: skip
    """Return the conversation as the chat template writes it.

    Raises:
        Rejected: the template refuses it, in its own words.
    """
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    reason = ""
    for arguments in (json.loads, json.dumps):  # most templates want an object, some want text
        try:
            given = [_with_arguments(message, arguments) for message in messages]
            return str(tokenizer.apply_chat_template(given, tokenize=False, **options))
        except (TypeError, ValueError, TemplateError) as error:
            reason = reason or str(error)
    raise Rejected(f"the chat template refuses it: {reason}")


@lru_cache(maxsize=16)
def knows_tools(tokenizer: Tokenizer, _template: str) -> bool:
    """Return whether the chat template, a part of the cache's key, writes the tools it is given."""
    return "Look something up." in chat_text(tokenizer, [_user("?")], True, [TOOL])


def holds_template_token(messages: list[Message], tokenizer: Tokenizer) -> bool:
    """Return whether a message's text holds a token that the template writes, such as <|im_end|>.

    The tokenizer turns such text into the real token, so a user's text could end or open a turn.
    """
    written = turn_ends(tokenizer, str(tokenizer.chat_template)).written
    return any(token in message["content"] for message in messages for token in written)


@dataclass(frozen=True)
class TurnEnds:
    """How a template ends the assistant's turns.

    Attributes:
        special: a pattern of the tokenizer's special tokens.
        of_answers, of_calls: patterns of the tokens that end an answer, and calls of tools.
        appended: text to add after the last turn: the next turn's first token if that ends a turn
            (GLM), EOS if the template writes no end, else nothing.
        tokens: all end tokens, of answers and of calls.
        header: what the generation prompt adds to a question.
        written: the special tokens that the template writes in a conversation without tools.
    """

    special: re.Pattern[str]
    of_answers: re.Pattern[str]
    of_calls: re.Pattern[str]
    appended: str
    tokens: tuple[str, ...]
    header: str
    written: frozenset[str]


@lru_cache(maxsize=16)
def turn_ends(tokenizer: Tokenizer, template: str) -> TurnEnds:
    """Return how this template ends a turn, as seen in two short conversations.

    Args:
        tokenizer: whose special tokens the template writes.
        template: its `chat_template`; part of the cache's key.
    """
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    special = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or "(?!)")
    answer, eos = [{"role": "assistant", "content": _mark(1)}], str(tokenizer.eos_token)
    last, inner = _tails(tokenizer, answer, [_user(_mark(2))], None)
    final, following = special.findall(last), special.findall(inner)
    shared = _shared(final, following)
    appended = ""
    if shared:
        answers = {shared[-1]}
    elif final and following:  # gpt-oss: <|return|> at the end, <|end|> elsewhere
        answers = {final[0], following[0]}
    elif following:  # GLM: the next turn's first token
        answers = {following[0]}
        appended = inner[len(_shared(last, inner)) : inner.index(following[0])] + following[0]
    elif final:
        answers = {final[0]}
    else:
        answers, appended = {eos}, eos
    calls = _ends_of_calls(tokenizer, special, own=not appended) or answers
    of_answers, of_calls = (re.compile("|".join(map(re.escape, each))) for each in (answers, calls))
    asked = [_user(_mark(1))]
    without, whole = (chat_text(tokenizer, asked, prompt) for prompt in (False, True))
    header = whole[len(_shared(without, whole)) :]
    written = frozenset(special.findall(chat_text(tokenizer, asked + answer, True))) - {""}
    tokens = tuple(sorted(answers | calls))
    return TurnEnds(special, of_answers, of_calls, appended, tokens, header, written)


def _ends_of_calls(tokenizer: Tokenizer, special: re.Pattern[str], own: bool) -> set[str]:
    function = {"name": "look", "arguments": {"at": _mark(1)}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    result = {"role": "tool", "name": "look", "content": _mark(2)}
    try:
        last, inner = _tails(tokenizer, [call], [result], [TOOL])
    except ValueError:
        return set()  # a template without tools
    final, following = special.findall(last), special.findall(inner)
    shared = _shared(final, following)
    if own:
        return {(shared or final)[-1]} if final else set()
    return {*following[len(shared) :][:1]}


def _tails(
    tokenizer: Tokenizer, said: list[Message], then: list[Message], tools: list[dict] | None
) -> tuple[str, str]:
    """Return what follows the marker in `said`: at the end, and before another turn."""
    last, inner = (
        MARK.split(chat_text(tokenizer, [_user("?"), *said, *more], False, tools))
        for more in ([], then)
    )
    if len(last) < 3:
        raise Rejected("the chat template leaves out or changes what the assistant says")
    return last[2], inner[2] if len(inner) > 4 else last[2]  # some drop it there


def _locate(
    messages: list[Message], tools: list[dict] | None, tokenizer: Tokenizer
) -> tuple[str, list[Span | None], list[Message]]:
    """Return the text, where each message's content stands in it, and the marked messages."""
    marked, contents = [], []
    for number, message in enumerate(messages):
        head, content, tail = _parts(message)
        contents.append(content)
        text = f"{head}{_mark(number)}{tail}" if content else head + tail
        marked.append(message | {"content": text})
    text = chat_text(tokenizer, messages, False, tools)
    first, *rest = _skeleton(marked, tools, tokenizer, prompt=False)
    places: list[Span | None] = [None] * len(messages)
    at = len(first)
    for number, literal in zip(map(int, rest[::2]), rest[1::2], strict=True):
        end = at + len(contents[number])
        if not (text.startswith(contents[number], at) and text.startswith(literal, end)):
            if messages[number]["role"] == "assistant":
                raise Rejected(f"the chat template changes what message {number + 1} says")
            end = text.find(literal, at) if literal else -1  # a tool's result as JSON, for example
        places[number], at = (at, end), end + len(literal)
        if end < 0:
            break
    if not text.startswith(first) or at != len(text):
        raise Rejected(
            "the text that the chat template writes around messages depends on their content or "
            "on the time; set model.chat_template to a copy without that"
        )
    return text, places, marked


def _skeleton(
    marked: list[Message], tools: list[dict] | None, tokenizer: Tokenizer, prompt: bool
) -> tuple[str, ...]:
    """Return the template's own text around the markers, and their numbers in between.

    It is cached, as rendering takes longer than tokenising: conversations with the same roles
    have the same one, unless there is reasoning or a call of a tool.
    """
    key = json.dumps([marked, tools], default=str)
    return _skeleton_of(key, tokenizer, str(tokenizer.chat_template), prompt)


@lru_cache(maxsize=256)
def _skeleton_of(key: str, tokenizer: Tokenizer, _template: str, prompt: bool) -> tuple[str, ...]:
    marked, tools = json.loads(key)
    return tuple(MARK.split(chat_text(tokenizer, marked, prompt, tools)))


def _parts(message: Message) -> tuple[str, str, str]:
    """Split a message's content: leading blanks and reasoning, the text, trailing blanks.

    Templates trim blanks and drop reasoning.
    """
    content, begin = message.get("content") or "", 0
    if message["role"] == "assistant" and "</think>" in content:
        begin = content.rindex("</think>") + len("</think>")
    said = content[begin:].strip()
    start = content.index(said, begin)
    return content[:start], said, content[start + len(said) :]


def _with_arguments(message: Message, convert: Any) -> Message:
    """Return a message whose tool calls have their arguments as an object, or as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str) == (convert is json.loads):
            function = function | {"arguments": convert(function["arguments"])}
        calls.append({"type": "function", **call, "function": function})
    return message | {"tool_calls": calls}


def _mark(number: int) -> str:
    return f"Qzx{number}xzQ"  # see MARK


def _shared[Sequence: (str, list[str])](one: Sequence, other: Sequence) -> Sequence:
    """Return the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
