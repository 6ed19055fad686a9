"""What a run shows of its rows: the samples that it asks, the proof of overfitting, its warnings."""

import json

from conftest import CALL, SMOKE, TOOL, chat, tokens, turn
from src.config import load_config
from src.data.dataset import load_tokens, read_part
from src.training.report import data_lines
from src.training.samples import questions, sample_prompts

ASKED, SAID = turn("user", "Which one?"), turn("assistant", "The first.")
CALLED = turn("assistant", tool_calls=[CALL])


def test_samples_and_proofs_ask_with_system_and_tools_for_what_was_trained(
    write_rows, tokenizer
) -> None:
    messages = [turn("system", "Be brief."), ASKED, CALLED, turn("tool", "At home."), SAID]
    config = load_config(
        SMOKE, [f"data.train={write_rows({'messages': messages, 'tools': [TOOL]})}"]
    )
    rows = read_part([str(config.data.train)], config.data)
    ((asked, answer),) = questions(rows, tokenizer)
    assert [m["role"] for m in asked["messages"]] == ["system", "user"]
    assert asked["tools"] == [TOOL]
    assert answer == '<tool_call>\n{"name": "look", "arguments": {"at": "home"}}\n</tool_call>'


def test_samples_are_rows_that_are_held_out(write_rows, tokenizer) -> None:
    rows = write_rows(*[chat(f"question {n}?", "a") for n in range(40)])
    share = load_config(SMOKE, [f"data.train={rows}", "data.eval=0.3", "evaluation.samples=4"])
    held = load_tokens(rows, tokenizer, share.data, part="eval")
    texts = [tokenizer.decode(held[[n]][0].input_ids) for n in range(len(held))]
    prompts = sample_prompts(share, tokenizer)
    assert len(prompts) == 4
    for prompt in prompts:
        assert any(prompt["messages"][-1]["content"] in text for text in texts)


def test_a_token_of_the_template_typed_as_text_is_counted(write_rows, tokenizer) -> None:
    source = write_rows(chat("q", "The token <|end|> ends."), chat("q", "<|eot|> does not"))
    *_, note = data_lines(tokens(source, tokenizer))
    assert note.startswith("1 row with a token of the chat template as text")


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
