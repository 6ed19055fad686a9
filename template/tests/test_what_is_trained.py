"""What a run shows of its rows: the samples that it asks, the proof of overfitting, its warnings."""

import json
from functools import partial

import pytest

from conftest import CALL, ROOT, SMOKE, TOOL, chat, tokens, turn
from src.config import load_config
from src.data.dataset import load_tokens, read_part
from src.data.describe import data_notes
from src.training.samples import questions, sample_prompts

ASKED, SAID = turn("user", "Which one?"), turn("assistant", "The first.")
CALLED = turn("assistant", tool_calls=[CALL])


def test_samples_and_proofs_ask_with_system_and_tools_for_what_was_trained(
    write_rows, tokenizer
) -> None:
    messages = [turn("system", "Be brief."), ASKED, CALLED, turn("tool", "At home."), SAID]
    config = load_config(
        SMOKE, [f"data.train={write_rows({'messages': messages, 'tools': [TOOL]})}"]
    )[0]
    rows = read_part([str(config.data.train)], config.data)
    ((asked, answer),) = questions(rows, 5, tokenizer)
    assert [m["role"] for m in asked["messages"]] == ["system", "user"]
    assert asked["tools"] == [TOOL]
    assert answer == '<tool_call>\n{"name": "look", "arguments": {"at": "home"}}\n</tool_call>'


def test_samples_are_rows_that_are_held_out(write_rows, tokenizer) -> None:
    rows = write_rows(*[chat(f"question {n}?", "a") for n in range(40)])
    share = load_config(SMOKE, [f"data.train={rows}", "data.eval=0.3", "evaluation.samples=4"])[0]
    held = load_tokens(rows, tokenizer, share.data, part="eval")
    texts = [tokenizer.decode(held[[n]][0].input_ids) for n in range(len(held))]
    prompts = sample_prompts(share, tokenizer)
    assert len(prompts) == 4
    for prompt in prompts:
        assert any(prompt["messages"][-1]["content"] in text for text in texts)


@pytest.mark.slow
def test_a_run_on_tools_is_proved_by_the_call_itself(train, write_rows) -> None:
    rows = write_rows({"messages": [ASKED, CALLED], "tools": [TOOL]})
    train(
        f"data.train={rows}", "data.eval=null", "data.max_length=512", "training.overfit=1",
        "training.epochs=120", "training.batch_size=1", "training.learning_rate=5e-3",
    )  # fmt: skip


def test_a_token_of_the_template_typed_as_text_is_counted(write_rows, tokenizer) -> None:
    source = write_rows(chat("q", "The token <|end|> ends."), chat("q", "<|eot|> does not"))
    _, note = data_notes(tokens(source, tokenizer).facts)
    assert note.startswith("1 row with a token of the chat template as text")


def test_what_is_seldom_meant_is_said_before_the_first_step(train, write_rows, capsys) -> None:
    rows = write_rows(*[chat("q " * 400, "a") for _ in range(3)])
    train = partial(train, f"data.train={rows}", "data.max_length=1024", "training.batch_size=1")
    train("data.eval=null", "training.epochs=1", "training.warmup_steps=100")
    said = capsys.readouterr().out
    assert "but the model has 512 positions" in said
    assert "training.warmup_steps=100: the rate never reaches 0.003" in said
    train(f"data.eval={rows}", "training.max_steps=1", output="few")
    assert "chosen by few documents: data.eval has 3" in capsys.readouterr().out
    train(f"data.eval={rows}", "training.max_steps=1", "training.resume=auto", output="few")
    assert "finished   nothing is left to train; a larger" in capsys.readouterr().out


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
    own = (ROOT / "configs/chat_template.j2").read_text()
    strict = own + "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = write_rows(strict, name="chat.j2")
    rows = write_rows({"messages": [turn("system", "s"), ASKED, SAID]}, chat("q", "a"))
    folder = train(
        f"model.chat_template={template}", f"data.train={rows}", f"data.eval={rows}",
        "data.bad_rows=skip", "training.max_steps=1",
    )  # fmt: skip
    assert "q" in (folder / "samples.jsonl").read_text()
