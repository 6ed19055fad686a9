"""Small models, tokenizers and files, made here: no test downloads anything or needs a GPU."""

import copy
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock

# Before any library reads them. Offline, so that a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# cuBLAS reads it when CUDA starts, which may be long before a test wants a deterministic run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as load_environment does
# Tiny models: more threads would spend their time waiting, above all where others use the cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Tokens are cached under HF_HOME: the user's own cache stays as it is.
_HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ["HF_HOME"] = _HF_HOME.name
ROOT = Path(__file__).resolve().parents[1]
SMOKE = str(ROOT / "configs/smoke.yaml")


def turn(role: str, content: str = "", **more: Any) -> dict:
    """A message."""
    return {"role": role, "content": content, **more}


def chat(question: str, answer: str) -> dict:
    """A row of one question and one answer."""
    return {"messages": [turn("user", question), turn("assistant", answer)]}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"at": "where"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "home"}}}


def metrics(folder: Path) -> list[dict]:
    """What a run has logged; unlike src's own reader, no broken line is passed over."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_tool(name: str, *arguments: str) -> bool:
    """Run a tool's script in this process; False where the project has deleted that tool."""
    if not (ROOT / f"scripts/{name}.py").is_file():
        return False
    importlib.import_module(f"scripts.{name}").main([*arguments])
    return True


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for all tests; this one for a single file, and for those of one GPU."""
    single = any(".py" in argument for argument in config.args)
    return 0 if single or config.option.markexpr == "gpu" else min(2, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def make_once(request: pytest.FixtureRequest, tmp_path_factory) -> Callable[..., Path]:
    """`make_once("name", make)`: a folder that `make` fills in one of the test processes for all."""
    place = tmp_path_factory.getbasetemp()
    place = place.parent if hasattr(request.config, "workerinput") else place

    def call(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = place / name, place / f"{name}.done"
        with FileLock(place / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return call


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny tokenizer with the project's chat template."""
    from src.config import ModelConfig
    from src.models.model import load_tokenizer

    return load_tokenizer(ModelConfig(name="configs/tiny"))


@pytest.fixture
def speak(tokenizer) -> Callable:
    """The tiny tokenizer with another chat template: `speak(template)`."""
    names = ("im_start", "im_end", "user", "assistant", "tool", "system")

    def make(template: str):
        other = copy.deepcopy(tokenizer)
        special = [f"<|{name}|>" for name in names] + ["<tool_call>", "</tool_call>"]
        other.add_special_tokens({"additional_special_tokens": special})
        other.chat_template = template
        return other

    return make


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A folder with a tiny pretrained model, as a hub model would look once downloaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "configs/tiny"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(saved_model: Path, tokenizer) -> Callable:
    """Build the tiny model as a run does: `make_model(lora=True, packing=True, dtype=…, …)`.

    `lora` may also be options of `LoraConfig`; other keywords are those of `ModelConfig`.
    """
    import torch

    from src.config import LoraConfig, ModelConfig

    def make(lora: bool | dict = False, packing: bool = True, dtype=torch.float32, **model):
        torch.manual_seed(0)
        options = {"r": 4, "alpha": 8} | (lora if isinstance(lora, dict) else {})
        adapters = None if lora is False else LoraConfig(**options)
        config = ModelConfig(**{"name": str(saved_model)} | model)
        return load_model(config, adapters, tokenizer, torch.device("cpu"), dtype, packing)

    return make


def load_model(config, lora, tokenizer, device, dtype, packing: bool = True, **trained):
    """A model with its attention set, compiled if `model.compile` says so."""
    from src.models.attention import set_attention
    from src.models.model import build_model, compile_layers

    model = build_model(config, lora, tokenizer, device, dtype, **trained)
    set_attention(model, config.attention, packing, dtype)
    if config.compile is True:
        compile_layers(model)
    return model


def write_lines(path: Path, *rows: dict | str) -> str:
    """Write rows as JSONL and return the path; text goes in as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL and return the path: `write_rows(row, row, …)`."""
    return lambda *rows, name="rows.jsonl": write_lines(tmp_path / name, *rows)


@pytest.fixture
def data(tokenizer, write_rows):
    """Twelve documents of very different lengths and label counts."""
    rows = [chat("why? " * (n % 5), "because " * (1 + n * n % 11)) for n in range(12)]
    return tokens(write_rows(*rows), tokenizer, max_length=64)


def tokens(source: str, tokenizer, limit: int | None = None, **data: Any):
    """The tokens of a source: `tokens(path, tokenizer, max_length=64)`."""
    from src.config import DataConfig
    from src.data.dataset import load_tokens

    return load_tokens(source, tokenizer, DataConfig(train=source, **data), limit)


def packed(data, indices: list[int], budget: int = 256) -> dict[str, Any]:
    """Documents of `data` in one row."""
    from src.data.batching import collate_packed

    return collate_packed(data[indices], budget=budget, max_length=64, pad_id=2)


def padded(data, indices: list[int]) -> dict[str, Any]:
    """Documents of `data`, one a row."""
    from src.data.batching import collate_padded

    return collate_padded(data[indices], max_length=64, pad_id=2)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Run scripts/train.py on the smoke config in this process; returns the output folder."""

    def call(*overrides: str, output: str = "run") -> Path:
        import scripts.train

        folder = tmp_path / output
        # Half of such a run would be answers otherwise.
        quick = ["tracking.enabled=false", "evaluation.max_length=8", f"output_dir={folder}"]
        scripts.train.main([SMOKE, "device=cpu", *quick, *overrides])
        return folder

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run a script's main that must fail as bad input does; returns the lines it printed."""

    def call(main: Callable[[list[str]], None], *arguments: str) -> list[str]:
        from src.utils.script import run_script

        capsys.readouterr()
        with mock.patch.object(sys, "argv", ["script", *arguments]), pytest.raises(SystemExit) as e:
            run_script(main)
        assert e.value.code == 2
        printed = capsys.readouterr().err.strip().splitlines()
        problems = [line for line in printed if not line.startswith("loading torch")]
        assert problems
        assert all(line.startswith("error: ") for line in problems), problems
        return [line.removeprefix("error: ") for line in problems]

    return call


@pytest.fixture(scope="session")
def mlflow_database(make_once) -> Path:
    """An MLflow database without runs; making one takes seconds, so tests copy it."""

    def make(folder: Path) -> None:
        with mock.patch.dict(os.environ, MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}"):
            from src.training.tracking import connect

            connect().create_experiment("first")

    return make_once("mlflow", make) / "mlflow.db"


@pytest.fixture(scope="session")
def smoke(make_once, mlflow_database: Path) -> Path:
    """The folder of the smoke run as README tells it, tracked in `mlflow.db` beside it."""

    def make(folder: Path) -> None:
        import scripts.train

        shutil.copy(mlflow_database, folder / "mlflow.db")
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        with mock.patch.dict(os.environ, MLFLOW_TRACKING_URI=uri):
            saved = "training.save_every=80"  # two checkpoints
            scripts.train.main([SMOKE, f"output_dir={folder / 'run'}", "device=cpu", saved])

    return make_once("smoke", make) / "run"
