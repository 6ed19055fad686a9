"""The page of `scripts/look.py`."""

import scripts.look
from conftest import SMOKE, chat


def test_a_look_at_the_data_tells_what_training_would_see(write_rows, tmp_path, capsys) -> None:
    rows = [chat(f"q{n}", f"a{n}") for n in range(8)]
    train = write_rows(*rows, rows[0], chat("q", ""), chat("long", "word " * 200))
    other = write_rows(chat("new", "b"), rows[3], name="eval.jsonl")
    (tmp_path / "out/final").mkdir(parents=True)  # a finished run is no reason not to look
    scripts.look.main([
        SMOKE, f"data.train={train}", f"data.eval={other}", f"output_dir={tmp_path / 'out'}"
    ])  # fmt: skip
    page = capsys.readouterr().out
    for line in (
        "data.train\n           documents: 10,",
        "1 row cut: longer than data.max_length=128",
        "1 row left out: nothing to learn from",
        f"{train}:10: no assistant message with text",
        "documents that repeat another one: 1",
        "data.eval\n           documents: 2,",
        "documents that are in data.train too: 1",
        "[a0<|end|>]",
    ):
        assert line in page, line
    assert page.count("--- document") == 3
    assert "longest 128" in page
