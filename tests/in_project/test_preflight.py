"""What cannot run is refused before anything is written: in one go, a line per problem."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import scripts.train
from conftest import SMOKE, chat
from src.config import Config, DataConfig, LoraConfig, ModelConfig
from src.models.model import build_model, load_tokenizer
from src.preflight import check_run
from src.trained import find_trained, load_trained
from src.utils.errors import UserError

CPU = torch.device("cpu")
# So that LoRA, which the smoke config does without, can be asked for at all.
PRETRAINED = ["model.init=pretrained", "model.name=some-org/absent-model"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 33\n"
DAMAGES = {
    "absent": lambda _: None,
    "empty": lambda _: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "a pointer": lambda _: POINTER,
}
MODEL = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# transformers has defaults for these, and half a template is a template.
HARMLESS = {
    *((file, "absent") for file in ("generation_config.json", "chat_template.jinja")),
    ("chat_template.jinja", "cut"),
}


def damage(whole: Path, folder: Path, file: str, how: str) -> Path:
    shutil.copytree(whole, folder)
    content = DAMAGES[how]((folder / file).read_bytes())
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    return folder


def train_on(model: Path, adapter: Path | None = None) -> None:
    """Check and load what a run would."""
    lora = LoraConfig(adapter=str(adapter)) if adapter else None
    config = Config(
        output_dir="outputs/never", model=ModelConfig(name=str(model)), lora=lora,
        data=DataConfig(train="data/sample.jsonl"),
    )  # fmt: skip
    check_run(config, output=False)
    tokenizer = load_tokenizer(config.model)
    build_model(config.model, lora, tokenizer, CPU, torch.float32)


def ask(model: Path) -> None:
    load_trained(find_trained(str(model)), CPU)


@pytest.fixture(scope="module")
def adapter(saved_model: Path, tokenizer, tmp_path_factory) -> Path:
    model = build_model(
        ModelConfig(name=str(saved_model)), LoraConfig(), tokenizer, CPU, torch.float32
    )
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", MODEL)
def test_a_damaged_file_of_a_model_is_one_line_with_its_name(
    saved_model: Path, tmp_path: Path, file: str, how: str
) -> None:
    folder = damage(saved_model, tmp_path / "model", file, how)
    for load in (train_on, ask):
        if (file, how) in HARMLESS:
            load(folder)
            continue
        with pytest.raises(UserError, match=str(folder)) as error:
            load(folder)
        (line,) = error.value.problems
        assert "\n" not in line
        part = file if how != "absent" else file.partition("_")[0].removeprefix("model.")
        assert part in line
        assert ("git lfs pull" in line) == (how == "a pointer")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", ADAPTER)
def test_a_damaged_file_of_an_adapter_is_one_line_with_its_name(
    saved_model: Path, adapter: Path, tmp_path: Path, file: str, how: str
) -> None:
    folder = damage(adapter, tmp_path / "adapter", file, how)
    for load in (ask, lambda folder: train_on(saved_model, folder)):
        with pytest.raises(UserError, match=f"{folder}.*{file}") as error:
            load(folder)
        (line,) = error.value.problems
        assert "\n" not in line
        assert ("git lfs pull" in line) == (how == "a pointer")


def test_a_shard_that_is_missing_or_cut_is_named(saved_model: Path, tmp_path: Path) -> None:
    folder = damage(saved_model, tmp_path / "model", "model.safetensors", "absent")
    save_file({"one": torch.ones(9)}, folder / "shard-1.safetensors")
    (folder / "shard-2.safetensors").write_bytes((folder / "shard-1.safetensors").read_bytes()[:-1])
    shards = {str(n): f"shard-{n}.safetensors" for n in (1, 2, 3)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError) as error:
        train_on(folder)
    cut, missing = error.value.problems
    assert cut.startswith(f"model.name: {folder}/shard-2.safetensors: cannot be read")
    assert missing.startswith(f"model.name: {folder}/shard-3.safetensors: ")


def test_a_tokenizer_that_this_library_cannot_read_says_what_helps(
    saved_model: Path, tmp_path: Path
) -> None:
    folder = damage(saved_model, tmp_path / "model", "tokenizer.json", "absent")
    described = json.loads((saved_model / "tokenizer.json").read_text())
    described["model"]["merges"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"cannot be used: .* untagged enum"):
        train_on(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"has no tokenizer.json: .* uv add sentencepiece"):
        train_on(folder)


def test_a_quantized_model_is_not_quantized_again(saved_model: Path, tmp_path: Path) -> None:
    folder = damage(saved_model, tmp_path / "model", "config.json", "absent")
    described = json.loads((saved_model / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(described))
    model = ModelConfig(name=str(folder), quantization="4bit")
    with pytest.raises(UserError, match=r"cannot be used: .*quantized") as error:
        build_model(model, None, load_tokenizer(model), CPU, torch.float32)
    assert len(error.value.problems) == 1


def test_a_base_that_moved_is_named_with_the_option_that_helps(
    saved_model: Path, tmp_path: Path, train
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(saved_model, tmp_path / "base")
    run = train(
        f"model.name={tmp_path / 'base'}", "model.init=pretrained", "lora.r=4",
        "training.epochs=1", "training.max_steps=1", "evaluation.samples=0",
    )  # fmt: skip
    (tmp_path / "base").rename(moved)
    for folder in (run / "final", run / "checkpoints/step-00000001"):
        with pytest.raises(UserError, match=f"is not at {tmp_path / 'base'}; give it with --base"):
            find_trained(str(folder))
        found = find_trained(str(folder), str(moved))
        assert load_trained(found, CPU)[0].name_or_path == str(moved)
    for name in (str(moved), "org/name"):
        with pytest.raises(UserError, match=f"--base goes with .*; {name} is a whole model"):
            find_trained(name, str(moved))
    checkpoint = run / "checkpoints/step-00000001"
    alone = shutil.copytree(checkpoint, tmp_path / "alone/of/its/run")
    with pytest.raises(UserError, match=r"alone/of/config.yaml: cannot be read"):
        find_trained(str(alone), str(moved))
    config = json.loads((moved / "config.json").read_text()) | {"model_type": "mistral"}
    mistral = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    mistral.save_pretrained(moved)
    with pytest.raises(
        UserError, match=f"{checkpoint}: was made for another model, a LlamaForCausalLM"
    ):
        load_trained(find_trained(str(checkpoint), str(moved)), CPU)
    shutil.rmtree(run / "final")
    with pytest.raises(UserError, match=r"a run that has not finished has its checkpoints"):
        find_trained(str(run))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=some-org/absent-model", "model.init=pretrained"], "is not on this machine and could not be fetched"),
        (["model.name=configs/absent"], "no such folder"),
        (["model.name=configs", "model.init=pretrained"], "no safetensors weights in it (a run's are in final/)"),
        (["device=cuda"], "device: "),
        (["model.attention=flash_attention_9"], "model.attention: flash_attention_9"),
        (["lora.adapter=outputs/none", *PRETRAINED], "lora.adapter: outputs/none: neither a folder"),
        (["lora.adapter=configs/tiny", *PRETRAINED], "configs/tiny: neither a folder with adapter_config.json (as a run's final/) nor"),
        (["training.resume=outputs/none"], "training.resume: outputs/none: not never, auto, or the folder"),
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


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, refused) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (line,) = refused(scripts.train.main, SMOKE, f"output_dir={tmp_path}")
    assert "holds a run already" in line
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}\n"]
