"""The command lines: quick where they refuse, and nothing imported that is not used."""

import os
import re
import subprocess
import sys

import pytest

import scripts.inference
from conftest import ROOT, SMOKE


@pytest.mark.parametrize("arguments", [["--help"], ["configs/smoke.yaml", "sed=1"]])
def test_help_and_config_errors_come_before_anything_heavy(arguments: list[str]) -> None:
    # -X importtime lists every module that is imported, on stderr.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "scripts/train.py"), *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "src.utils.errors" in imported
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "mlflow", "datasets", "pyarrow"}
    assert not imported & heavy
    assert "Traceback" not in done.stderr


STOP_AT_TORCH = """
import os, sys
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
            os._exit(0)
sys.meta_path.insert(0, Stop())
import scripts.train
scripts.train.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("deterministic", "found"), [("true", ":4096:8"), ("false", "None")])
def test_cublas_is_told_of_determinism_before_torch_can_start_cuda(
    tmp_path, deterministic: str, found: str
) -> None:
    options = [f"deterministic={deterministic}", f"output_dir={tmp_path / 'run'}"]
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-uc", STOP_AT_TORCH, SMOKE, *options], env=environment, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [found]


@pytest.mark.slow  # it imports torch once more
def test_a_start_imports_nothing_that_a_run_may_not_need() -> None:
    code = (
        "from src.utils.environment import load_environment\n"
        "from src.utils.script import quick_imports\n"
        "load_environment()\n"
        "with quick_imports():\n"
        "    import src.training.run\n"
        "import gc, sys\n"
        "print(*({'datasets', 'matplotlib', 'mlflow'} & set(sys.modules)), gc.isenabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
    assert not done.stderr, "C++ libraries report leaks where frozen objects are not thawed"


@pytest.mark.parametrize("option", ["--temperature=nan", "--top-p=2", "--seed=-1"])
def test_a_number_out_of_range_is_an_error_of_its_option(option: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts.inference.main(["model", "question", option])
    name, number = option.split("=")
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {name}" in last
    assert f": {number} is not from " in last


def test_help_shows_the_defaults(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        scripts.inference.main(["--help"])
    defaults = re.findall(r"\(default: (.*?)\)", " ".join(capsys.readouterr().out.split()))
    assert defaults == ["256", "auto", "printed", "16", "0.0", "1.0", "0", "as it was trained"]
