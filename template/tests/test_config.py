"""A mistake in a config is found at once, all of them together, each with its place."""

from pathlib import Path

import pytest
import yaml

from conftest import ROOT, SMOKE
from src.config import load_config
from src.utils.errors import UserError


def problems(*overrides: str, path: str = SMOKE) -> list[str]:
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    return list(error.value.problems)


@pytest.mark.parametrize("name", ["smoke.yaml", "train.yaml"])
def test_every_shipped_config_loads(name: str) -> None:
    config, plain = load_config(ROOT / "configs" / name)
    assert config.model.name == plain["model"]["name"]
    assert name == "train.yaml" or config.tracking.experiment == ROOT.name


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown key; did you mean training.learning_rate?"),
        ("lr=1", "lr: unknown key; did you mean training.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean training.learning_rate?"),
        ("lora={rank: 3}", "lora.rank: unknown key; did you mean lora.r?"),
        ("training.epochs=1.5", "training.epochs: 1.5 is not allowed: a whole number is expected"),
        ("training.learning_rate=-1", "training.learning_rate: -1 is not allowed: expected greater than 0"),
        ("training.learning_rate=.nan", "training.learning_rate: nan is not allowed"),
        ("model.quantization=int8", "model.quantization: 'int8' is not allowed: expected '4bit', '8bit' or 'none'"),
        ("training=3", "training: 3 is not allowed: a section of keys is expected"),
        ("data.train=", "data.train: None is not allowed: text is expected"),
        ("tracking.experiment=no", "tracking.experiment: False is not allowed: text is expected (quote it"),
        (f"tracking.experiment={'x' * 251}", f"tracking.experiment: '{'x' * 251}' is not allowed: String should have at most 250"),
        ("lora={target_modules: []}", "lora.target_modules: [] is not allowed: List should have at least 1 item"),
        ("training.strategy=fsdp model.quantization=4bit", "training.strategy: fsdp shards neither"),
        ("training.patience=3 data.eval=null", "training.patience: needs data.eval"),
        ("lora.r=8", "lora: an adapter is saved without its base"),
        ("model.init=pretrained lora.dora=true model.quantization=8bit", "lora.dora: PEFT loses the scales"),
        ("model.init=pretrained lora.target_parameters=[a] lora.dropout=0.1", "lora.target_parameters: PEFT adapts"),
        ("model.quantization=4bit", "model.quantization: 4bit weights cannot be trained themselves"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named_with_what_is_allowed(override: str, expected: str) -> None:
    overrides = override.split(" ") if "={" not in override else [override]
    found = problems(*overrides)
    assert any(line.startswith(f"command line: {expected}") for line in found), found


def test_all_problems_are_reported_in_one_go_and_those_of_the_file_with_their_lines(
    tmp_path: Path,
) -> None:
    text = Path(SMOKE).read_text().replace("epochs: 40", "epochs: forty\n  epoch: 1")
    file = tmp_path / "c.yaml"
    file.write_text(text)
    line = text.splitlines().index("  epochs: forty") + 1
    assert problems("sed=1", "data.max_length=-1", path=str(file)) == [
        "command line: data.max_length: -1 is not allowed: expected greater than or equal to 8",
        f"{file}:{line}: training.epochs: 'forty' is not allowed: a whole number is expected",
        f"{file}:{line + 1}: training.epoch: unknown key; did you mean training.epochs?",
        "command line: sed: unknown key; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "output_dir: missing, and has no default"),
        ("[1, 2]", "a config is a mapping of keys to values"),
        ("word", "word: unknown key"),
        ("a: b: c", ":1: not valid YAML"),
        ("a:\n<<<<<<< mine\n  b: 1\n=======\n", "(an update's conflict is not settled)"),
        ("seed: 1\nseed: 2", ":2: not valid YAML: found duplicate key"),
        ("output_dir: ${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
        ("a: !!python/object/apply:os.system [ls]", ":1: not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_says_why(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    found = problems(path=str(file))
    assert any(expected in line for line in found), found
    assert all(line.startswith(str(file)) for line in found)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs", "3"], "unknown option --epochs; write training.epochs=3."),
        (["--learning-rate=1e-4"], "unknown option --learning-rate=1e-4; write training.learning_rate=1e-4."),
        (["--config", "my.yaml"], "unknown option --config; write my.yaml."),
        (["--what"], "unknown option --what; write key=…."),
        (["seed"], "'seed' is not key=value."),
    ],
)  # fmt: skip
def test_an_option_is_answered_with_the_key_to_write(arguments: list[str], expected: str) -> None:
    (line,) = problems(*arguments)
    assert line == f"command line: {expected} A config file comes before the keys."


def test_rows_in_place_of_a_config_are_not_read() -> None:
    (line,) = problems(path="data/mine.csv")
    assert line == "data/mine.csv: not a .yaml file; rows are named by data.train=data/mine.csv"


def test_a_config_that_is_not_there_says_where_it_looked_and_which_there_are(monkeypatch) -> None:
    monkeypatch.chdir("/")
    (line,) = problems(path="configs/smok.yaml")
    assert line.startswith("/configs/smok.yaml: no such config file; the project has configs/smoke")


def test_numbers_and_sections_are_read_as_people_write_them() -> None:
    overrides = ["training.learning_rate=2e-4", "training.max_steps=1e3", "model.init=pretrained"]
    config, _ = load_config(SMOKE, [*overrides, "lora.r=8"])
    assert (config.training.learning_rate, config.training.max_steps) == (2e-4, 1000)
    assert config.lora
    assert config.lora.r == 8
    assert load_config(SMOKE, [*overrides, "lora.r=8", "lora=null"])[0].lora is None


def test_without_the_environment_a_reference_is_written_as_what_it_stands_for(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(Path(SMOKE).read_text().replace("outputs/smoke", "outputs/${model.init}"))
    config, plain = load_config(file)
    assert config.output_dir == plain["output_dir"] == "outputs/random"


def test_a_secret_from_the_environment_is_never_written_down(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_NAME", "hf_canary")
    file = tmp_path / "c.yaml"
    keys = "experiment: '${oc.env:SECRET_NAME}', run_name: '${tracking.experiment}'"
    file.write_text(f"{Path(SMOKE).read_text()}tracking: {{{keys}}}\n")
    config, plain = load_config(file)
    assert config.tracking.run_name == "hf_canary"
    assert "hf_canary" not in yaml.safe_dump(plain)
    file.write_text(yaml.safe_dump(plain))
    assert load_config(file)[0] == config, "what was written reads back as the same config"
