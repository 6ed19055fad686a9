"""Questions that cannot be asked, and a model whose weights are broken."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import scripts.inference

WAYS = "give prompts (--system or --raw), --chat (--system) or --input (--output)"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a", "--chat"], WAYS),
        (["--output", "x"], WAYS),
        (
            ["a", "--input", "x"],
            "command line: 'a': options are written key=value, after a config file",
        ),
        (["data.column=a", "--input", "x"], "data.column: unknown key; did you mean data.columns?"),
        (["training.x=1", "--input", "x"], "command line: training.x=1: only data. keys go here"),
        (["q", "--raw", "--system", "x"], WAYS),
        (["--input", "x", "--system", "x"], WAYS),
        ([" "], "an empty prompt: there is nothing to answer"),
    ],
)
def test_ways_of_asking_exclude_each_other(smoke: Path, refused, arguments, line: str) -> None:
    assert refused(scripts.inference.main, str(smoke), *arguments) == [line]


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_weights_that_are_no_numbers_are_named_instead_of_answering_with_any_token(
    smoke: Path, tmp_path, refused, number: str
) -> None:
    folder = shutil.copytree(smoke / "final", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float(number)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (line,) = refused(scripts.inference.main, str(folder), "q")
    assert line == f"{folder}: model.norm.weight holds numbers that are NaN or infinite"
