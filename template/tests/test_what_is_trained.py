"""What is trained is what the row says, and what is asked is the prompt that training saw.

Every shape of rows under four kinds of templates: the project's own, ChatML, Llama 3's, and one
whose author marked the assistant's turns.
"""

import copy
import csv
import json
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from conftest import ROOT, SMOKE, chat
from src.config import DataConfig, load_config
from src.data import IGNORE
from src.data.chat import render
from src.data.dataset import load_tokens, read_part
from src.data.describe import data_notes
from src.data.encoding import encode, stop_token_ids
from src.data.rows import read_question, read_rows
from src.data.sources import raw_rows
from src.models.generation import _encode
from src.training.samples import questions, sample_prompts

CALLS = (
    "{% for t in m.tool_calls or [] %}<tool_call>{{ t.function.name }} "
    "{{ t.function.arguments | tojson }}</tool_call>{% endfor %}"
)
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    f"{{{{ m.content }}}}{CALLS}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start|>tools<|stop|>\n\n{{ tools | tojson }}<|eot|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    f"{{{{ m.content | trim }}}}{CALLS}<|eot|>{{% endfor %}}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
# The marks end before the turn does: taken as they are, answers would never stop.
MARKED = CHATML.replace(
    f"{{{{ m.content }}}}{CALLS}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}" + CALLS
    + "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>",
)  # fmt: skip
TEMPLATES = {"own": None, "chatml": CHATML, "llama3": LLAMA3, "marked": MARKED}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"at": "where"}}}


def turn(role: str, content: str = "", **more) -> dict:
    return {"role": role, "content": content, **more}


def call(**arguments) -> dict:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


ASKED, SAID = turn("user", "Which one?"), turn("assistant", "The first.")
SHAPES = {
    "messages": ({"messages": [ASKED, SAID]}, ["The first."]),
    "two turns": (
        {"messages": [ASKED, SAID, turn("user", "And then?"), turn("assistant", "The second.")]},
        ["The first.", "The second."],
    ),
    "system message": ({"messages": [turn("system", "Be brief."), ASKED, SAID]}, ["The first."]),
    "system column": ({"messages": [ASKED, SAID], "system": "Be brief."}, ["The first."]),
    "pair with system": (
        {"prompt": "Which one?", "completion": "The first.", "system": "Be brief."},
        ["The first."],
    ),
    "instruction": (
        {"instruction": "Which one?", "input": "Of the two.", "output": "The first."},
        ["The first."],
    ),
    "dolly": (
        {"instruction": "Which one?", "context": "Of the two.", "response": "The first."},
        ["The first."],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Which one?"},
                           {"from": "gpt", "value": "The first."}], "system": "Be brief."},
        ["The first."],
    ),
    "question": ({"question": "Which one?", "answer": "The first."}, ["The first."]),
    "opened by the assistant": (
        {"messages": [turn("assistant", "Hello."), ASKED, SAID]}, ["Hello.", "The first."],
    ),
    "not all trained": (
        {"messages": [ASKED, turn("assistant", "Wrong.", weight=0), ASKED,
                      turn("assistant", "Bad.", train=False), ASKED, SAID]},
        ["The first."],
    ),
    "tools": (
        {"messages": [turn("system", "Be brief."), ASKED,
                      turn("assistant", "", tool_calls=[call(at="home"), call(at="work")]),
                      turn("tool", "It is at home."), SAID], "tools": [TOOL]},
        ["home", "The first."],
    ),
    "reasoning": (
        {"messages": [ASKED, turn("assistant", "The first.", reasoning_content="Of two.")]},
        ["The first."],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    return AutoTokenizer.from_pretrained(ROOT / "configs/tiny")


@pytest.fixture
def speak(loaded):
    def make(template: str | None):
        tokenizer = copy.deepcopy(loaded)  # a tenth of the time that loading takes
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        own = (ROOT / "configs/chat_template.j2").read_text()
        tokenizer.chat_template = template or own
        return tokenizer

    return make


def words(value) -> list[str]:
    """All that a row says, and that is no name of a column or role."""
    if isinstance(value, dict):
        skipped = {"role", "from", "type", "weight", "train"}
        return [word for k, v in value.items() if k not in skipped for word in words(v)]
    if isinstance(value, list):
        return [word for each in value for word in words(each)]
    return [value] if isinstance(value, str) and value else []


def write(row: dict, form: str, folder: Path) -> str:
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif form == "parquet":  # beside one with other keys, which Arrow fills with nulls
        other = {**row, "messages": [turn("user", "x", other="y"), turn("assistant", "z")]}
        table = [row, other] if "messages" in row else [row]
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            writer.writeheader()
            writer.writerow(row)
    return str(path)


FORMS = [
    (shape, form)
    for shape, (row, _) in SHAPES.items()
    for form in ("jsonl", "parquet", "csv")
    if form != "csv" or all(isinstance(cell, str) for cell in row.values())
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("shape", "form"), FORMS)
def test_what_is_labelled_is_what_the_assistant_says_and_what_is_asked_was_trained(
    shape: str, template: str, form: str, speak, tmp_path
) -> None:
    raw, expected = SHAPES[shape]
    tokenizer, data = speak(TEMPLATES[template]), DataConfig(train="-")
    source = write(raw, form, tmp_path)
    row = next(iter(read_rows(source, data)))
    ((ids, labels, prompted),) = encode([row], tokenizer)
    text = tokenizer.decode(ids)
    said = "".join(
        tokenizer.decode([i]) if label != IGNORE else "\0"
        for i, label in zip(ids, labels, strict=True)
    )
    spans = [span for span in said.split("\0") if span]
    stop = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)[-1])
    assert len(spans) == len(expected)
    for span, wanted in zip(spans, expected, strict=True):
        assert wanted in span
        assert span.endswith(stop), "else answers never stop"
    assert prompted
    for word in words(raw):
        assert word in text, "nothing of a row is left out"
    # The question of the last answer, as inference would ask it from the same file.
    _, first = next(iter(raw_rows(source)))
    asked = read_question(first, data)
    assert asked["messages"] == row["messages"][:-1]
    prompt, _ = _encode(asked, tokenizer, raw=False)
    starts = [
        n for n, label in enumerate(labels) if label != IGNORE and labels[n - 1] == IGNORE
    ]  # fmt: skip
    assert ids[: len(prompt)] == prompt
    assert len(prompt) == starts[-1], "where the last answer begins"


def test_the_projects_own_template_round_trips_tools_in_the_common_form(speak) -> None:
    tokenizer, (raw, _) = speak(None), SHAPES["tools"]
    text, spans, _ = render(raw["messages"], raw["tools"], tokenizer)
    listed = text.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert [json.loads(line) for line in listed.splitlines()] == [TOOL]
    called = text[slice(*spans[0])].removesuffix("<|end|>")
    found = [part.split("\n</tool_call>")[0] for part in called.split("<tool_call>\n")[1:]]
    assert list(map(json.loads, found)) == [
        {"name": "look", "arguments": {"at": where}} for where in ("home", "work")
    ]
    assert "<tool_response>\nIt is at home.\n</tool_response>" in text
    assert text.count("### System:") == 1


def test_a_named_template_is_picked_as_transformers_picks_it(speak) -> None:
    tokenizer = speak(None)
    tokenizer.chat_template = {"default": MARKED, "tool_use": CHATML}
    assert render([ASKED, SAID], None, tokenizer).text.startswith("<|im_start|>user\nWhich one?")
    assert "look" in render([ASKED, SAID], [TOOL], tokenizer).text


def test_arguments_given_as_text_are_written_once_by_a_marked_template(speak, write_rows) -> None:
    turns = [
        ASKED,
        turn(
            "assistant",
            "",
            tool_calls=[{"function": {"name": "look", "arguments": '{"at": "home"}'}}],
        ),
    ]
    (row,) = read_rows(write_rows({"messages": turns}), DataConfig(train="-"))
    assert '{"at": "home"}</tool_call>' in render(row["messages"], None, speak(MARKED)).text


def test_a_turn_that_a_template_drops_is_refused(speak) -> None:
    tokenizer = speak(
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    )
    raw, _ = SHAPES["tools"]
    (found,) = encode([{**raw, "read_as": "messages"}], tokenizer)
    assert str(found) == "the chat template leaves out message 4"


def test_a_prompt_that_ends_in_a_blank_loses_no_label_and_is_asked_without_it(speak) -> None:
    tokenizer = speak(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    merged = tokenizer("assistant: the")["input_ids"]
    assert (
        tokenizer("assistant: ")["input_ids"]
        != merged[: len(tokenizer("assistant: ")["input_ids"])]
    )
    messages = [turn("user", "Which?"), turn("assistant", "the")]
    ((ids, labels, _),) = encode([{"messages": messages, "read_as": "messages"}], tokenizer)
    assert tokenizer.decode([i for i in labels if i != IGNORE]).strip() == "the<|end|>"
    asked, blank = _encode(messages[:1], tokenizer, raw=False)
    assert ids[: len(asked)] == asked
    assert labels[len(asked)] != IGNORE == labels[len(asked) - 1]
    assert blank == " "


def test_text_that_has_bos_and_eos_already_gets_none(speak) -> None:
    tokenizer = speak(None)
    tokenizer.backend_tokenizer.post_processor = None
    for text in ("Once upon", "Once upon<|end|>"):
        ((ids, _, _),) = encode([{"text": text}], tokenizer)
        assert tokenizer.decode(ids) == "Once upon<|end|>"


def test_samples_and_proofs_ask_with_system_and_tools_for_what_was_trained(
    write_rows, speak
) -> None:
    raw, _ = SHAPES["tools"]
    config = load_config(SMOKE, [f"data.train={write_rows(raw)}"])[0]
    ((asked, wanted),) = questions(read_part([config.data.train], config.data), 5, speak(CHATML))
    assert [m["role"] for m in asked["messages"]] == ["system", "user"]
    assert asked["tools"] == [TOOL]
    assert wanted.startswith("<tool_call>look")
    assert wanted.endswith("</tool_call>"), "nothing at all would be right for an empty one"


def test_samples_are_rows_that_are_held_out(write_rows, tokenizer) -> None:
    rows = write_rows(*[chat(f"question {n}?", "a") for n in range(40)])
    share = load_config(SMOKE, [f"data.train={rows}", "data.eval=0.3", "evaluation.samples=4"])[0]
    held = load_tokens(rows, tokenizer, share.data, part="eval")
    texts = [tokenizer.decode(held[[n]][0].input_ids) for n in range(len(held))]
    prompts = sample_prompts(share, tokenizer)
    assert len(prompts) == 4
    for prompt in prompts:
        assert any(prompt["messages"][-1]["content"] in text for text in texts)


def test_a_run_on_tools_is_proved_by_the_call_itself(train, write_rows, tmp_path) -> None:
    turns = [ASKED, turn("assistant", "", tool_calls=[call(at="home")])]
    rows = write_rows({"messages": turns, "tools": [TOOL]})
    train(
        f"data.train={rows}", "data.eval=null", "data.max_length=512", "training.overfit=1",
        "training.epochs=120", "training.batch_size=1", "training.learning_rate=5e-3",
    )  # fmt: skip


def test_a_token_of_the_template_typed_as_text_is_counted(write_rows, speak) -> None:
    source = write_rows(chat("q", "The token <|im_end|> ends."), chat("q", "<|eot|> does not"))
    data = DataConfig(train=source)
    facts = load_tokens(source, speak(CHATML), data).facts
    assert any("hold a token of the chat template as text" in x for x in data_notes(facts))


def test_what_is_seldom_meant_is_said_before_the_first_step(train, write_rows, capsys) -> None:
    rows = write_rows(*[chat("q " * 400, "a") for _ in range(3)])
    train = partial(train, f"data.train={rows}", "data.max_length=1024", "training.batch_size=1")
    train("data.eval=null", "training.epochs=1", "training.warmup_steps=100")
    said = capsys.readouterr().out
    assert "and the model was made for 512 positions" in said
    assert "training.warmup_steps=100 in a run of 3 steps: the rate ends at 9e-05" in said
    train(f"data.eval={rows}", "training.max_steps=1", output="few")
    assert "only 3 documents to evaluate on" in capsys.readouterr().out
    train(f"data.eval={rows}", "training.max_steps=1", "training.resume=auto", output="few")
    assert "a larger training.max_steps adds more" in capsys.readouterr().out


def test_a_row_without_an_answer_within_the_length_is_written_down(write_rows, tokenizer) -> None:
    source = write_rows(chat("q", "a"), chat("word " * 200, "a"))
    found = load_tokens(source, tokenizer, DataConfig(train=source, max_length=64))
    (left,) = map(json.loads, found.left_out.read_text().splitlines())
    assert left["place"] == f"{source}:2"
    assert left["reason"].startswith("no answer within data.max_length=64")


def test_rows_that_ask_nothing_are_passed_over_by_samples_and_proofs(train, write_rows) -> None:
    rows = write_rows(
        {"messages": [turn("assistant", "Hello."), ASKED, SAID]},
        {"messages": [turn("assistant", "Hello.")]},
        {"messages": [ASKED, turn("assistant", ""), ASKED, SAID]},
        {"messages": [ASKED, turn("assistant", "<think>x</think>"), ASKED, SAID]},
        {"text": "Once upon a time"},
    )
    folder = train(f"data.train={rows}", f"data.eval={rows}", "training.max_steps=1")
    lines = (folder / "samples.jsonl").read_text().splitlines()
    asked = [sample["prompt"] for sample in json.loads(lines[0])["samples"]]
    assert [prompt[-1]["content"] for prompt in asked] == ["Which one?"]


def test_rows_that_a_template_refuses_are_left_out_of_samples_too(train, write_rows) -> None:
    strict = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = write_rows(strict.replace("<|im_end|>", "{{ eos_token }}"), name="chat.j2")
    rows = write_rows({"messages": [turn("system", "s"), ASKED, SAID]}, chat("q", "a"))
    folder = train(
        f"model.chat_template={template}", f"data.train={rows}", f"data.eval={rows}",
        "data.bad_rows=skip", "training.max_steps=1",
    )  # fmt: skip
    assert "q" in (folder / "samples.jsonl").read_text()


def test_a_row_that_holds_a_marker_is_refused_in_words(speak) -> None:
    for said in (
        turn("assistant", "x", reasoning_content="Qzx0xzQ"),
        turn("assistant", "", tool_calls=[call(at="Qzx9xzQ")]),
    ):
        (found,) = encode([{"messages": [ASKED, said], "read_as": "messages"}], speak(CHATML))
        assert "holds text such as Qzx1xzQ" in str(found)


def test_a_call_alone_before_another_answer_keeps_the_header_unlabelled(speak) -> None:
    # As Qwen 3 writes reasoning: of the last turn alone, so that a shorter conversation differs.
    thinks = "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    tokenizer = speak(CHATML.replace("{{ m.content }}", thinks))
    turns = [ASKED, turn("assistant", "", tool_calls=[call(at="home")]), SAID]
    text, spans, _ = render(turns, None, tokenizer)
    assert text[slice(*spans[0])].startswith("<tool_call>look")
    assert text[slice(*spans[1])] == "<think></think>The first.<|im_end|>"
