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
    config = load_config(ROOT / "configs" / name)
    assert config.model.name == config.written["model"]["name"]
    assert name == "train.yaml" or config.tracking.experiment == ROOT.name


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown key; did you mean training.learning_rate?"),
        ("trainig={epochs: 3}", "trainig: unknown key; did you mean training?"),
        ("lr=1", "lr: unknown key; did you mean training.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean training.learning_rate?"),
        ("lora={rank: 3}", "lora.rank: unknown key; did you mean lora.r?"),
        ("training.epochs=1.5", "training.epochs: 1.5 is not allowed; expected a valid integer"),
        ("training.learning_rate=.nan", "training.learning_rate: nan is not allowed"),
        ("model.quantization=int8", "model.quantization: 'int8' is not allowed; expected '4bit', '8bit' or 'none'"),
        ("data.train=", "data.train: None is not allowed; expected a valid string; expected a valid list"),
        ("training.patience=3 data.eval=null", "training.patience: needs data.eval"),
        ("lora={r: 8}", "lora: needs a base that is saved"),
        ("seed", "'seed': options are written key=value, after a config file"),
        ("--epochs=3", "'--epochs=3': options are written key=value, after a config file"),
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
        "command line: data.max_length: -1 is not allowed; expected greater than or equal to 8",
        f"{file}:{line}: training.epochs: 'forty' is not allowed; expected a valid integer",
        f"{file}:{line + 1}: training.epoch: unknown key; did you mean training.epochs?",
        "command line: sed: unknown key; did you mean seed?",
    ]


def test_a_file_that_is_no_config_says_why(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text, expected in {
        "a:\n  b: c: d": ":2: not valid YAML: ",
        "[1]": ": a config is a ",
    }.items():
        file.write_text(text)
        assert problems(path=str(file))[0].startswith(f"{file}{expected}")
    assert problems(path="gone.yaml")[0].startswith("gone.yaml: cannot be read: FileNotFoundError")


def test_numbers_and_sections_are_read_as_people_write_them() -> None:
    overrides = ["training.learning_rate=2e-4", "model.init=pretrained", "lora.r=8"]
    config = load_config(SMOKE, overrides)
    assert config.training.learning_rate == 2e-4
    assert config.lora
    assert config.lora.r == 8
    assert load_config(SMOKE, [*overrides, "lora=null"]).lora is None


def test_a_secret_from_the_environment_is_never_written_down(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_NAME", "hf_canary")
    file = tmp_path / "c.yaml"
    keys = "experiment: '${oc.env:SECRET_NAME}', run_name: '${tracking.experiment}'"
    file.write_text(f"{Path(SMOKE).read_text()}tracking: {{{keys}}}\n")
    config = load_config(file)
    assert config.tracking.run_name == "hf_canary"
    assert "hf_canary" not in yaml.safe_dump(config.written)
    file.write_text(yaml.safe_dump(config.written))
    assert load_config(file) == config, "what was written reads back as the same config"
