"""The doctor: each of its checks in health, and with the problem that it is there for."""

import subprocess
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
import torch

import scripts.doctor
from conftest import SMOKE, chat
from src.config import Config, from_command_line
from src.tools import doctor
from src.tools.doctor import Finding
from src.training import fit, record
from src.training.plan import CannotPlan
from src.utils import device

CPU = torch.device("cpu")
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b")


def configured(*overrides: str) -> Config:
    return from_command_line([SMOKE, *overrides])


def problems(findings: Iterable[Finding]) -> list[str]:
    """What is not OK, each with its verdict."""
    return [f"{each.verdict} {each.text}" for each in findings if each.verdict != "OK"]


# --- machine


def test_a_machine_without_a_gpu_suits_a_small_model(saved_model) -> None:
    keys = ("lora.r=4", "model.quantization=4bit", "model.init=pretrained", "device=cpu")
    *_, finding = doctor._check_machine(configured(f"model.name={saved_model}", *keys))
    assert finding == ("OK", "tried torch.float32 matmul on cpu, 4-bit quantization", "")


def test_a_run_that_this_device_cannot_do_fails(monkeypatch) -> None:
    def failure(*overrides: str) -> str:
        return problems(dict(doctor.examine(configured(*overrides)))["machine"])[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert failure("device=cuda").startswith("FAIL device: cuda is not available")
    monkeypatch.setattr(fit, "count_before_loading", lambda _: 8_000_000_000)
    assert failure().startswith("FAIL device: no GPU here, and")
    monkeypatch.setattr(device, "unusable_gpu", lambda: "a GPU is here, but its driver …")
    assert failure().startswith("FAIL device: a GPU is here, but its driver …")


# --- project


def test_a_project_without_git_or_with_changes_or_a_leaked_secret_is_named(
    tmp_path, monkeypatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *AUTHOR, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(record, "PROJECT_ROOT", tmp_path)
    fails = ["WARN `git status` fails: a run cannot record its code"]
    assert problems(doctor._check_project()) == fails, "there is no repository"
    git("init")
    git("commit", "--allow-empty", "-m", "x")
    assert [finding.verdict for finding in doctor._check_project()] == ["OK"]
    (tmp_path / ".env").write_text("HF_TOKEN=x\n")
    (line,) = problems(doctor._check_project())
    assert line.startswith("WARN uncommitted files: 1")
    git("add", ".env")
    git("commit", "-m", "y")
    git("rm", ".env")
    git("commit", "-m", "z")
    assert problems(doctor._check_project()) == ["WARN .env is in `git log --all -- .env`"]
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # "dubious ownership"
    assert problems(doctor._check_project()) == fails


# --- data and template


@pytest.fixture
def look(write_rows) -> Callable[..., list[Finding]]:
    """Check rows: `look(row, …, template="…", overrides=[…])`."""

    def check(*rows: dict | str, template: str = "", overrides: tuple[str, ...] = ()):
        keys = [f"data.train={write_rows(*rows)}", *overrides]
        if template:
            keys.append(f"model.chat_template={write_rows(template, name='chat.j2')}")
        return list(dict(doctor.examine(configured("data.eval=null", *keys)))["data and template"])

    return check


GOOD = [chat(f"q{n}", f"a{n}") for n in range(8)]
LONG = chat("q", "w " * 200)
ONLY_TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_rows_in_order_have_no_warning(look, write_rows) -> None:
    other = write_rows(chat("new", "b"), name="eval.jsonl")
    findings = look(*GOOD, overrides=(f"data.eval={other}",))
    assert not problems(findings)
    assert findings[-1].text == "8 of 8 documents teach a stop token"


@pytest.mark.parametrize(
    ("rows", "template", "overrides", "expected"),
    [
        (GOOD, "", (), "WARN no rows to evaluate on"),
        (GOOD, "{{ bos_token }}" * 2 + ONLY_TEXT, (), "FAIL documents begin with two BOS tokens"),
        ([LONG], "", (), "FAIL 0 of 1 documents teach a stop token"),
        ([*GOOD, LONG], "", (), "WARN 8 of 9 documents teach a stop token"),
        (GOOD, "", ("data.eval=SAME",), "WARN 8 documents of data.eval are in data.train too"),
        (["{"], "", (), "rows.jsonl:1: "),
        (GOOD, "", ("model.name=configs/none",), "FAIL model.name: configs/none: no such folder"),
    ],
)
def test_each_problem_of_rows_is_named(look, tmp_path, rows, template, overrides, expected) -> None:
    overrides = tuple(word.replace("SAME", str(tmp_path / "rows.jsonl")) for word in overrides)
    lines = problems(look(*rows, template=template, overrides=overrides))
    assert sum(expected in line for line in lines) == 1, lines


# --- the page


def test_the_page_has_four_parts_and_fails_with_one_of_them(capsys, monkeypatch, refused) -> None:
    def page(*arguments: str, fails: bool = False) -> str:
        with pytest.raises(SystemExit, match=str(fails)):
            scripts.doctor.main([SMOKE, "device=cpu", *arguments])
        return capsys.readouterr().out

    monkeypatch.setattr(doctor, "git", lambda *words: "")  # whatever this checkout is like
    marks = ("  OK    ", "  WARN  ", "        → ")
    parts = [line for line in page().splitlines() if not line.startswith(marks)]
    assert parts == ["machine", "project", "data and template", "memory and disk"]
    failed = page("data.train=gone", "model.name=org/name", "model.init=pretrained", fails=True)
    assert "data and template\n  FAIL  " in failed
    assert "is not on this machine" in failed.partition("memory and disk\n  FAIL  ")[2]
    unplanned = mock.Mock(side_effect=CannotPlan("x cannot be planned: …"))
    monkeypatch.setattr(doctor, "plan_for", unplanned)
    assert "WARN  no plan: x cannot be planned: …" in page()
    assert refused(scripts.doctor.main, SMOKE, "sed=1")[0].startswith("command line: sed: ")
