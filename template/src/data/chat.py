"""Render a conversation as one text, and find what the assistant says in it, for any template.

Chat templates trim and rewrite turns, drop earlier reasoning, and differ in how a turn ends. So
as little as possible is assumed. A conversation is rendered in three ways:
1. with a marker in place of each message's text, which shows the template's own text;
2. as it is: each message stands between the template's texts;
3. cut before an answer, with the generation prompt, which shows where answers begin.
"""

import json
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import Rejected
from src.data.rows import carries_loss
from src.utils.errors import first_line

Message = dict[str, Any]
Span = tuple[int, int]  # of characters: start and end

MARK = re.compile(r"Qzx(\d+)xzQ")  # letters and digits: templates neither trim nor escape them
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK = {"name": "look", "description": "Look something up.", "parameters": PARAMETERS}
EXAMPLE = {"type": "function", "function": LOOK}  # a tool, to see how a template writes one


class Rendered(NamedTuple):
    """A conversation as the model sees it."""

    text: str
    spans: list[Span]  # what the model has to produce
    prompted: bool  # whether the whole generation prompt stands before each span


def render(messages: list[Message], tools: list[dict] | None, tokenizer: Tokenizer) -> Rendered:
    """Return the conversation as one text, and the spans of it that carry loss.

    A span begins where the generation prompt would end, after the turn's header, and ends with the
    token that ends the turn. It holds the reasoning that the template kept, the answer and calls.

    Raises:
        Rejected: the template refuses the conversation, leaves out a message, changes an answer,
            depends on content or time, or writes an answer without its header or end of turn.
    """
    if MARK.search(str(messages)):
        raise Rejected("the row holds text such as Qzx1xzQ, which is a marker here; change it")
    template = str(tokenizer.chat_template)
    turns = turn_format(tokenizer, template)
    text, places, marked = _locate(messages, tools, tokenizer)
    # What decides the prompt after a message: its role, the blanks after its marker, its calls.
    kinds = [(m["role"], MARK.split(m["content"])[2:], m.get("tool_calls") or []) for m in marked]
    spans, prompted, end = [], True, 0  # end: of the previous message
    for number, message in enumerate(messages):
        place, calls = places[number], message.get("tool_calls") or []
        if message["role"] != "assistant" or not (place or calls):
            end = place[1] if place else end
            continue
        next_start = next((later[0] for later in places[number + 1 :] if later), len(text))
        prompt = None  # search for the header; after tool calls `end` is not its place
        if number and (before := places[number - 1]) and not kinds[number - 1][2]:
            end = before[1]
            # Rendering everything before each answer is quadratic in turns. The prompt depends only
            # on the kind of the previous message: render it after the first one of that kind.
            first = kinds.index(kinds[number - 1])
            shorter = json.dumps([marked[: first + 1], tools], default=str)
            prompt = _skeleton(shorter, tokenizer, template, prompt=True)[-1]
        start, whole = _beginning(text, (end, place[0] if place else next_start), prompt, turns)
        end = place[1] if place else start
        if not all(call["function"]["name"] in text[start:next_start] for call in calls):
            raise Rejected(f"the chat template leaves out the calls of message {number + 1}")
        end_of_turn = turns.end_of_calls if calls else turns.end_of_answer
        closing = end_of_turn.search(text, end, next_start)
        if closing:
            end = closing.end()
        elif next_start == len(text):
            text += turns.appended
            end = len(text)
        else:
            raise Rejected(f"the chat template writes no end of turn after message {number + 1}")
        if carries_loss(message):
            spans.append((start, end))
            prompted = prompted and whole
    return Rendered(text, spans, prompted)


def _beginning(
    text: str, within: Span, prompt: str | None, turns: "TurnFormat"
) -> tuple[int, bool]:
    """Return where an answer begins, and whether the whole generation prompt stands before it.

    Args:
        text: of the conversation.
        within: where the answer's header and reasoning stand.
        prompt: the generation prompt here. Earlier answers may lack its last part, such as
            <think>: templates drop it with old reasoning. None: search for the header.
        turns: of the template.
    """
    start, until = within
    if prompt is None:
        prompt = turns.header
        # At least up to the role's name: less than that begins other roles' headers too.
        role = re.match(rf".*?(?:{turns.special.pattern})\w*", prompt, re.DOTALL)
        start = text.find(role[0] if role else prompt, start, until)
        if start < 0:  # Llama 3.1 with tools gives the first message a user's header
            raise Rejected("the chat template writes an answer without the header of its prompt")
    shared = _common_length(text[start:until], prompt)
    start += shared
    for token in turns.special.finditer(text, within[0], until):
        if token.start() < start < token.end():  # do not begin inside a special token
            start = token.start()
    return start, shared == len(prompt)


def chat_text(
    tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool,
    tools: list[dict] | None = None,
) -> str:  # fmt: skip
    """Return the conversation as the chat template writes it.

    Args:
        tokenizer: whose chat template it is.
        messages: as `read_message` returns them; arguments of tools are objects.
        add_generation_prompt: whether to write the header of an answer at the end.
        tools: that the assistant may call.

    Raises:
        Rejected: the template refuses it, in its own words.
    """
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    reason = ""
    for convert in (dict, _with_text_arguments):
        try:
            given = [convert(message) for message in messages]
            return str(tokenizer.apply_chat_template(given, tokenize=False, **options))
        except (TypeError, ValueError, RecursionError, TemplateError) as error:
            reason = reason or first_line(error)
    raise Rejected(f"the chat template refuses it: {reason}")


def _with_text_arguments(message: Message) -> Message:
    """Return a message with the arguments of its tool calls as JSON text: DeepSeek's form."""
    calls = deepcopy(message.get("tool_calls") or [])
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return message | {"tool_calls": calls} if calls else message


class TurnFormat(NamedTuple):
    """How a template writes the assistant's turns.

    Attributes:
        special: a pattern of the tokenizer's special tokens.
        header: what the generation prompt adds to a question.
        end_of_answer, end_of_calls: patterns of the tokens that end an answer, and calls of tools.
        appended: text to add after the last turn: up to the next turn's first token where that
            token ends a turn (GLM); EOS where the template writes no end; else empty.
        end_tokens: all end tokens, of answers and of calls.
        prints_tools: whether it writes the tools that it is given.
    """

    special: re.Pattern[str]
    header: str
    end_of_answer: re.Pattern[str]
    end_of_calls: re.Pattern[str]
    appended: str
    end_tokens: tuple[str, ...]
    prints_tools: bool


@lru_cache(maxsize=16)
def turn_format(tokenizer: Tokenizer, template: str) -> TurnFormat:
    """Return how this template writes turns, as seen in short conversations.

    Args:
        tokenizer: whose special tokens the template writes.
        template: its `chat_template`; part of the cache's key.
    """
    special = _any_of(tokenizer.get_added_vocab())
    question, mark = {"role": "user", "content": "?"}, _mark(1)
    asked, with_prompt = (chat_text(tokenizer, [question], add) for add in (False, True))
    answer = {"role": "assistant", "content": mark}
    last, inner = _tails(tokenizer, [question, answer], question, None)
    closes = bool(special.search(last))  # else the next turn's first token ends a turn (GLM)
    answers, appended = _end_tokens(special, last, inner, closes), ""
    if answers and not closes:
        (token,) = answers
        appended = inner[_common_length(last, inner) : inner.index(token)] + token
    elif not answers:
        answers, appended = {str(tokenizer.eos_token)}, str(tokenizer.eos_token)
    function = {"name": "look", "arguments": {"at": mark}}
    call = {"role": "assistant", "content": "", "tool_calls": [EXAMPLE | {"function": function}]}
    result = {"role": "tool", "name": "look", "content": "?"}
    try:
        tails = _tails(tokenizer, [question, call], result, [EXAMPLE])
        calls = _end_tokens(special, *tails, closes)
        prints_tools = chat_text(tokenizer, [question], True, [EXAMPLE]) != with_prompt
    except Rejected:  # a template without tools
        calls, prints_tools = set(), False
    return TurnFormat(
        special, with_prompt[_common_length(asked, with_prompt) :], _any_of(answers),
        _any_of(calls or answers), appended, tuple(sorted(answers | calls)), prints_tools,
    )  # fmt: skip


def _tails(
    tokenizer: Tokenizer, messages: list[Message], then: Message, tools: list[dict] | None
) -> tuple[str, str]:
    """Return the text after the marker: with its turn last, and with `then` after it."""
    last, inner = (
        chat_text(tokenizer, [*messages, *more], False, tools).rpartition(_mark(1))
        for more in ([], [then])
    )
    if not last[1]:
        raise Rejected("the chat template leaves out or changes what the assistant says")
    return last[2], inner[2] if inner[1] else last[2]  # some templates drop the turn


def _end_tokens(special: re.Pattern[str], last: str, inner: str, closes: bool) -> set[str]:
    """Return the tokens that end a turn, given the two texts that `_tails` returns."""
    final, following = special.findall(last), special.findall(inner)
    shared = _common_length(final, following)
    if not closes:
        return {*following[shared : shared + 1]}
    if shared:
        return {final[shared - 1]}
    return {*final[:1], *following[:1]}  # gpt-oss: <|return|> at the end, <|end|> elsewhere


def _locate(
    messages: list[Message], tools: list[dict] | None, tokenizer: Tokenizer
) -> tuple[str, list[Span | None], list[Message]]:
    """Return the text, where each message's content stands in it, and the marked messages."""
    marked, contents = [], []
    for number, message in enumerate(messages):
        # Templates drop reasoning and trim blanks: neither is part of the marked text.
        reasoning, end, answer = message["content"].rpartition("</think>")
        blanks, content, tail = answer.partition(answer.strip() or "\0")
        contents.append(content)
        # An empty question or result is marked too: what follows it is the prompt of an answer.
        marks = content or message["role"] in {"user", "tool"}
        text = f"{reasoning}{end}{blanks}{_mark(number) if marks else ''}{tail}"
        marked.append(message | {"content": text})
    text = chat_text(tokenizer, messages, False, tools)
    conversation = json.dumps([marked, tools], default=str)
    first, *pieces = _skeleton(conversation, tokenizer, str(tokenizer.chat_template), prompt=False)
    places: list[Span | None] = [None] * len(messages)
    at = len(first)
    for number, literal in zip(map(int, pieces[::2]), pieces[1::2], strict=True):
        end = at + len(contents[number])
        if not text.startswith(contents[number] + literal, at):
            if messages[number]["role"] == "assistant":
                raise Rejected(f"the chat template changes what message {number + 1} says")
            # The template may rewrite it, such as a tool's result as JSON.
            end = text.find(literal, at) if literal else -1
        places[number], at = (at, end), end + len(literal)
        if end < 0:
            break
    if not text.startswith(first) or at != len(text):
        raise Rejected(
            "the text that the chat template writes around messages depends on their content or "
            "on the time; set model.chat_template to a copy without that"
        )
    for number, content in enumerate(contents):
        if content and not places[number]:
            raise Rejected(f"the chat template leaves out message {number + 1}")
    return text, places, marked


@lru_cache(maxsize=256)
def _skeleton(
    conversation: str, tokenizer: Tokenizer, template: str, prompt: bool
) -> tuple[str, ...]:
    """Return the template's own texts and the numbers of the markers between them, alternating.

    It is cached, as rendering takes longer than tokenising: conversations with equal roles share
    one skeleton, unless there is reasoning or a call of a tool.

    Args:
        conversation: marked messages and tools, as JSON.
        tokenizer: whose template it is.
        template: its `chat_template`; part of the cache's key.
        prompt: whether to write the header of an answer at the end.
    """
    marked, tools = json.loads(conversation)
    return tuple(MARK.split(chat_text(tokenizer, marked, prompt, tools)))


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of these tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _mark(number: int) -> str:
    return f"Qzx{number}xzQ"  # see MARK


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
