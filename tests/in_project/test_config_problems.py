"""Mistakes in a config that are seldom made are one line each, too."""

from pathlib import Path

import pytest

from conftest import SMOKE
from src.config import load_config
from src.utils.errors import UserError

FRESH = "model.init=pretrained"


def problems(path: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_config(path, [*overrides])
    return list(error.value.problems)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.learning_rate=-1"], "training.learning_rate: -1 is not allowed; expected greater than 0"),
        (["training=3"], "training: 3 is not allowed; expected a valid dictionary"),
        (["tracking.experiment=no"], "tracking.experiment: False is not allowed; expected a valid string"),
        (["lora={target_modules: []}"], "lora.target_modules: [] is not allowed; expected a valid string; List should have at least 1 item"),
        (["data.eval=5"], "data.eval: 5 is not allowed; expected a valid string; expected a valid list; expected less than 1"),
        (["training.patience=3"], "training.patience: counts evaluations during training"),
        (["a.b.c=1"], "a: unknown key"),
        (["training.typo.c=1"], "training.typo: unknown key"),
        (["seed=[1"], "seed=[1: cannot be read: ParserError"),
        (["training.strategy=fsdp", "model.quantization=4bit"], "training.strategy: quantized weights and"),
        ([FRESH, "lora.dora=true", "model.quantization=8bit"], "lora.dora: PEFT loses the scales"),
        ([FRESH, "lora.target_parameters=[a]", "lora.dropout=0.1"], "lora.target_parameters: PEFT needs lora.dora=false"),
        (["model.quantization=4bit"], "model.quantization: quantized weights are not trained"),
        (["model.attention=varlen", "data.packing=false"], "model.attention: varlen reads packed batches"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named_with_what_is_allowed(overrides, expected: str) -> None:
    found = problems(SMOKE, *overrides)
    assert any(line.startswith(f"command line: {expected}") for line in found), found


def test_a_value_that_no_type_takes_is_one_problem() -> None:
    (line,) = problems(SMOKE, "model.compile=3")
    assert line.startswith("command line: model.compile: 3 is not allowed")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "output_dir: missing, and has no default"),
        ("word", "a config is a mapping of keys to values"),
        ("5", "a config is a mapping of keys to values"),
        ("true", "a config is a mapping of keys to values"),
        ("# nothing", "output_dir: missing, and has no default"),
        ("seed: 1\nseed: 2", ":2: not valid YAML: found duplicate key"),
        ("output_dir: ${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
        ("a: !!python/object/apply:os.system [ls]", ":1: not valid YAML"),
        ("output_dir: ${x", "cannot be read: GrammarParseError"),
        ("clé: 1", "cannot be read: UnicodeDecodeError"),
    ],
)
def test_a_file_that_is_no_config_says_why(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("latin-1"))
    found = problems(file)
    assert any(expected in line for line in found), found
    assert all(line.startswith(str(file)) for line in found)
