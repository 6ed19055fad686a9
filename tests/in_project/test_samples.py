"""Rows that are seldom meant as they are: what is said of them, and what is asked of them."""

from functools import partial

import pytest

from conftest import CALL, ROOT, TOOL, chat, turn

ASKED, SAID = turn("user", "Which one?"), turn("assistant", "The first.")
CALLED = turn("assistant", tool_calls=[CALL])


@pytest.mark.slow
def test_a_run_on_tools_is_proved_by_the_call_itself(train, write_rows) -> None:
    rows = write_rows({"messages": [ASKED, CALLED], "tools": [TOOL]})
    train(
        f"data.train={rows}", "data.eval=null", "data.max_length=512", "training.overfit=1",
        "training.epochs=120", "training.batch_size=1", "training.learning_rate=5e-3",
    )  # fmt: skip


def test_what_is_seldom_meant_is_said_before_the_first_step(train, write_rows, capsys) -> None:
    rows = write_rows(*[chat("q " * 400, "a") for _ in range(3)])
    train = partial(train, f"data.train={rows}", "data.max_length=1024", "training.batch_size=1")
    train("data.eval=null", "training.max_steps=1", "training.warmup_steps=2")
    printed = capsys.readouterr().out
    assert "but the model has 512 positions" in printed
    assert "training.warmup_steps=2: training ends before the rate reaches" in printed
    train("data.eval=null", "training.max_steps=1", "training.resume=auto")
    assert "finished   nothing is left to train; to go on" in capsys.readouterr().out


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
