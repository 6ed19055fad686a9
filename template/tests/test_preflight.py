"""What cannot run is refused before anything is written: in one go, a line per problem."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import scripts.train
from conftest import SMOKE, chat
from src.data.rows import FIRST_ROWS

# So that LoRA, which the smoke config does without, can be asked for at all.
PRETRAINED = ["model.init=pretrained", "model.name=some-org/absent-model"]


def broken(saved_model: Path, tmp_path: Path, remove: str = "", **config: object) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(saved_model, folder)
    for file in folder.glob(remove or "nothing"):
        file.unlink()
    if config:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | config))
    return folder


@pytest.mark.parametrize(
    ("remove", "config", "override", "expected"),
    [
        ("token*", {}, "lora.r=4", "no tokenizer in this folder"),
        ("*.safetensors", {}, "lora.r=4", "no safetensors weights in this folder; model.init=random"),
        ("config.json", {}, "lora.r=4", "no config.json in this folder"),
        ("", {"quantization_config": {"quant_method": "gptq"}}, "model.quantization=4bit", "is quantized already (gptq)"),
    ],
)  # fmt: skip
def test_a_model_folder_that_lacks_something_is_refused_before_loading(
    saved_model, tmp_path, refused, remove, config, override, expected
) -> None:  # fmt: skip
    folder = broken(saved_model, tmp_path, remove, **config)
    output = tmp_path / "run"
    lines = refused(
        scripts.train.main, SMOKE, f"model.name={folder}", "model.init=pretrained", "lora.r=4",
        override, f"output_dir={output}",
    )  # fmt: skip
    assert expected in lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=some-org/absent-model", "model.init=pretrained"], "is not on this machine and could not be fetched"),
        (["model.name=configs/absent"], "no such folder"),
        (["model.name=some-org/absent-model"], "random needs a local folder"),
        (["device=cuda"], "device: "),
        (["model.attention=flash_attention_9"], "model.attention: flash_attention_9"),
        (["model.attention=varlen", "data.packing=false"], "varlen reads packed batches"),
        (["lora.adapter=outputs/none", *PRETRAINED], "lora.adapter: outputs/none: no such folder"),
        (["lora.adapter=configs/tiny", *PRETRAINED], "configs/tiny: no adapter_config.json in this folder"),
        (["training.resume=outputs/none"], "training.resume: outputs/none: not a checkpoint"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line(tmp_path, refused, overrides, expected) -> None:
    if "device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so device=cuda is right here")
    output = tmp_path / "run"
    lines = refused(
        scripts.train.main, SMOKE, f"output_dir={output}", "tracking.enabled=false", *overrides
    )
    assert len(lines) == 1
    assert expected in lines[0], lines
    assert not output.exists()


def test_a_run_with_bad_input_reports_everything_and_writes_nothing(
    tmp_path: Path, write_rows, refused
) -> None:  # fmt: skip
    output = tmp_path / "run"
    lines = refused(
        scripts.train.main, SMOKE, f"output_dir={output}",
        f"data.train={write_rows(chat('q', 'a'), {'text': 1})}", "data.eval=missing.jsonl",
        "model.chat_template=missing.j2",
    )  # fmt: skip
    assert len(lines) == 3, lines
    assert not output.exists()


def test_a_bad_row_that_is_found_while_tokenising_is_one_line_too(
    tmp_path: Path, write_rows, refused
) -> None:
    output, file = tmp_path / "run", write_rows(*[chat("q", "a")] * FIRST_ROWS, {"text": 5})
    lines = refused(
        scripts.train.main, SMOKE, f"output_dir={output}", f"data.train={file}", "device=cpu"
    )
    assert lines == [f"{file}:{FIRST_ROWS + 1}: `text` must be text, not a number"]
    assert not output.exists()


def test_a_second_run_in_the_same_folder_is_refused(smoke: Path, refused) -> None:
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*")}
    (line,) = refused(scripts.train.main, SMOKE, f"output_dir={smoke}")
    assert "holds a run already" in line
    assert {p: p.stat().st_mtime_ns for p in smoke.rglob("*")} == before
