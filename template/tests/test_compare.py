"""Two runs side by side: what differs, what each reached, and one picture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import scripts.compare
from conftest import ROOT
from scripts.compare import compare
from src.config import load_config


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs of other rates, library, rows, commit and lora, of which one was evaluated."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, lora in zip(folders, (None, {"r": 8}), strict=True):
        folder.mkdir()
        config = load_config(ROOT / "configs/smoke.yaml", [f"output_dir={folder}"]).written
        (folder / "config.yaml").write_text(json.dumps(config | {"lora": lora}))
        numbers = {"learning_rate": 1, "tokens_per_second": 2e3, "eval_loss": 0.25}
        lines = [{"step": step, "loss": 1 / step} | numbers for step in (10, 20, 23, 30)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        tags = {"torch": "2.1" if lora else "2.0", "command": str(folder), "git.dirty": "true"}
        facts = {"key": "0", "started": 0, "tags": tags}
        facts["status"] = "KILLED" if lora else "FINISHED"
        (folder / "record.json").write_text(json.dumps(facts))
    (folders[1] / "uncommitted.diff").write_text("+1")
    report = {"data": "a.jsonl", "scores": {"model": {"exact": 0.5}}}
    (folders[1] / "evaluation.json").write_text(json.dumps(report))
    return folders


def test_what_differs_is_named_in_a_line_each_and_what_was_reached(runs: list[Path]) -> None:
    different, reached = compare(runs)
    assert different.keys() == {"lora", "lora.r", "torch", "uncommitted.diff"}
    assert different["lora.r"] == ["-", "8"]
    assert different["uncommitted.diff"][0] == "-"
    assert reached == {
        "status": ["FINISHED", "KILLED"],
        "steps": ["30", "30"],
        "loss": ["0.03333", "0.03333"],
        "best evaluation": ["0.25", "0.25"],
        "tokens per second": ["2,000", "2,000"],
        "exact on a.jsonl": ["-", "0.5"],
    }


def test_the_script_prints_both_and_draws_their_curves_without_torch(runs, tmp_path) -> None:
    from matplotlib.image import imread

    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": null}\n')
    picture = tmp_path / "new/curves.png"
    command = [sys.executable, "-X", "importtime", ROOT / "scripts/compare.py", *runs]
    done = subprocess.run(
        [*command, "--output", picture], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "| torch" not in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["torch", "2.0", "2.1"] in rows
    assert ["status", "FINISHED", "KILLED"] in rows
    assert ["loss", "0.03333", "not", "finite"] in rows
    assert imread(picture).shape[:2] == (540, 960)


def test_equal_runs_differ_in_nothing_and_what_is_no_run_is_refused(
    runs, tmp_path, refused, capsys
) -> None:
    scripts.compare.main([*map(str, [runs[0], runs[0]]), "--output", str(tmp_path / "curves.png")])
    assert capsys.readouterr().out.splitlines()[1] == "nothing"
    assert "not a run's folder" in refused(scripts.compare.main, str(runs[0]), str(tmp_path))[0]
