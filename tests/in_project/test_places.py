"""Files, folders, `.env` and the command line: written whole, and refused in one line."""

import errno
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import scripts.train
from conftest import ROOT, SMOKE
from src.trained import find_trained
from src.training import record
from src.training.record import read_metrics, read_record, start_record
from src.utils import environment
from src.utils.errors import UserError
from src.utils.files import new_folder, write_text
from src.utils.script import run_script


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which does not import torch."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_dotenv_is_read_before_any_library_and_the_shell_wins(tmp_path, monkeypatch) -> None:
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfHF_HOME=/from/dotenv\nHF_TOKEN=from-dotenv\n")
    code = (
        "import src.utils.environment as e, pathlib, sys\n"
        "e.PROJECT_ROOT = pathlib.Path(sys.argv[1])\n"
        "e.load_environment()\n"
        "import huggingface_hub.constants as c, os\n"
        "print(c.HF_HOME, os.environ['HF_TOKEN'])"
    )
    monkeypatch.delenv("HF_HOME")
    done = python(code, str(tmp_path), HF_TOKEN="from-shell")
    assert done.stdout.split() == ["/from/dotenv", "from-shell"]
    # An empty value would make huggingface_hub write into the current folder.
    done = python(code, "/", HF_TOKEN="from-shell", HF_HOME="")
    assert done.stdout.split() == [str(Path("~/.cache/huggingface").expanduser()), "from-shell"]


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-LE", "Latin-1"])
def test_a_dotenv_that_is_not_utf8_is_named(tmp_path, monkeypatch, refused, encoding: str) -> None:
    (tmp_path / ".env").write_bytes("HF_TOKEN=clé\n".encode(encoding))
    monkeypatch.setattr(environment, "PROJECT_ROOT", tmp_path)
    (line,) = refused(print)
    assert line.startswith(f"{tmp_path / '.env'}: not UTF-8 text (")


def places(folder: Path) -> dict[str, Path]:
    (folder / "file").touch()
    (folder / "link").symlink_to(folder / "nowhere")
    return {
        "a file": folder / "file",
        "below a file": folder / "file/a/run",
        "a link to nothing": folder / "link",
        "below a link to nothing": folder / "link/run",
        "too long": folder / ("x" * 300),
        "too long with its lock": folder / ("x" * 250),
        "a system's folder": Path("/proc/run"),
        "below one": Path("/proc/1/run/a"),
    }


@pytest.mark.parametrize("folder", ["/", ".", ".."])
def test_a_run_gets_a_folder_of_its_own(folder: str, refused) -> None:
    (line,) = refused(scripts.train.main, SMOKE, f"output_dir={folder}")
    assert line == f"output_dir: {folder}: the project is in it; give a run its own folder"


@pytest.mark.parametrize("key", ["output_dir", "HF_HOME"])
def test_a_place_that_cannot_be_written_is_one_line_before_torch_is_imported(
    tmp_path: Path, monkeypatch, refused, key: str
) -> None:
    output = f"output_dir={tmp_path / 'run'}"
    for name, path in places(tmp_path).items():
        if key == "HF_HOME":
            monkeypatch.setenv(key, str(path))
        else:
            output = f"output_dir={path}"
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setitem(sys.modules, "src.training.run", None)  # importing it would fail
        (line,) = refused(scripts.train.main, SMOKE, output)
        assert line.startswith(f"{key}: {path}: cannot be written: "), name
        assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_no_check_looked_at_is_one_line_too(tmp_path: Path, refused) -> None:
    path = places(tmp_path)["below a file"]
    assert refused(lambda _: write_text(path, "")) == [f"{path.parent}/.run.tmp: Not a directory"]


def test_output_that_nobody_reads_or_in_another_encoding_is_no_traceback() -> None:
    code = (
        "from src.utils.script import run_script\n"
        "run_script(lambda _: [print('→', n) for n in range(100_000)] and None)"
    )
    command = f'"{sys.executable}" -c "{code}" | head -1'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("? 0\n", "", 141)


def test_a_printed_line_is_in_a_pipe_at_once() -> None:
    code = (
        "import os\nfrom src.utils.script import run_script\n"
        "run_script(lambda _: [print('line'), os._exit(3)] and None)"  # which flushes nothing
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": ""}, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("line\n", 3)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "a/b"

    def fail_half_way() -> None:
        with new_folder(path) as folder:
            (folder / "x").write_text("1")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - our own
        fail_half_way()
    assert list(path.parent.iterdir()) == []
    with new_folder(path) as folder:
        (folder / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"
    with pytest.raises(FileExistsError), new_folder(path):
        pass
    assert [p.name for p in path.parent.iterdir()] == ["b"], "nothing is left beside it"


def test_a_text_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("as if killed here"))
    with pytest.raises(pytest.fail.Exception):
        write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_place_that_only_the_work_itself_finds_bad_is_one_line_too(tmp_path, refused) -> None:
    def work(_: list[str]) -> None:
        (tmp_path / "file/below").write_text("")

    (tmp_path / "file").touch()
    assert refused(work) == [f"{tmp_path / 'file/below'}: Not a directory"]


def test_a_connection_that_another_process_lost_is_no_place() -> None:
    def lose(_: list[str]) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        run_script(lose)


def test_damaged_files_of_a_run_are_named(tmp_path) -> None:
    recipe = tmp_path / "training_config.yaml"
    (tmp_path / "config.json").write_text("{}")
    for text in ("", "model: {quantization: 5bit}", "a: [", "[]"):
        recipe.write_text(text)
        with pytest.raises(UserError, match=f"^{recipe}:"):
            find_trained(str(tmp_path))
    for text in ("{", "{}", "[1]", "null"):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(UserError, match=r"record.json: is damaged"):
            read_record(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_conflict_in_code_that_is_imported_is_one_line(tmp_path, refused) -> None:
    def main(_: list[str]) -> None:
        (tmp_path / "config.py").write_text(f"x = 1\n{'<' * 7} before updating\n")
        runpy.run_path(str(tmp_path / "config.py"))

    (line,) = refused(main)
    assert line == f"{tmp_path / 'config.py'}:2: invalid syntax: {'<' * 7} before updating"


def test_outside_of_git_a_run_has_no_commit_and_where_git_fails_it_says_so(
    monkeypatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(record, "PROJECT_ROOT", tmp_path)
    start_record(tmp_path, {}, {}, 0)
    tags = read_record(tmp_path)["tags"]
    assert not {"mlflow.source.git.commit", "git.dirty"} & tags.keys()
    assert not (tmp_path / "uncommitted.diff").exists()
    assert capsys.readouterr().out == ""
    (tmp_path / ".git").mkdir()  # which git refuses, as it does a folder of another user
    start_record(tmp_path, {}, {}, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: record.json has no commit, because git fails here")


def test_a_system_that_is_not_supported_is_named_in_one_line(refused, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    (line,) = refused(lambda _: pytest.fail("nothing is started"))
    assert line.startswith("this system, win32, is not supported: use Linux, WSL2, or macOS")
