"""Inputs that would be trained, asked or overwritten without a word, and tracebacks that were."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import scripts.compare
from conftest import chat, turn
from scripts.inference import _chat
from scripts.plan import size_of_gpu
from src.config import DEFAULTS, DataConfig, LoraConfig, ModelConfig, changed
from src.data.answers import check_answers
from src.models.adapters import add_adapters
from src.models.model import load_tokenizer
from src.tools.evaluate import write_evaluation
from src.trained import find_trained
from src.training.record import read_metrics
from src.utils.errors import UserError
from src.utils.files import RECIPE
from test_chat import said
from test_rows import read

DATA = DataConfig(train="-")


def test_a_model_without_tokenizer_files_gets_no_empty_tokenizer(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


def test_two_answers_in_a_row_have_no_labelled_header_after_an_empty_one(tokenizer) -> None:
    turns = [("user", "u"), ("assistant", ""), ("user", "v"), ("assistant", "a")]
    messages = [turn(*each) for each in [*turns, ("assistant", "b")]]
    assert said(tokenizer, *messages) == ["a<|end|>", "b<|end|>"]


def test_a_layer_is_adapted_or_trained_whole_and_not_both(make_model) -> None:
    lora = LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"lora\.modules_to_save too has lm_head"):
        add_adapters(make_model(False), lora)


def test_compare_overwrites_no_file_of_a_run(smoke: Path, tmp_path, refused) -> None:
    run = shutil.copytree(smoke, tmp_path / "run")
    arguments = [str(run), str(run), "--output", str(run / "config.yaml")]
    assert "the picture is a .png" in refused(scripts.compare.main, *arguments)[0]
    (run / "config.yaml").write_text("")
    assert "a file of this run is damaged" in refused(scripts.compare.main, *arguments[:2])[0]


def test_a_file_of_rows_is_not_cut_as_the_output_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(chat('q', 'a') | {'generated_by': 'm', 'generated': 'x'})[:-1]}")
    text = path.read_text()
    with pytest.raises(UserError, match="is the input"):
        check_answers(str(path), path, DATA, "m")
    assert path.read_text() == text


def test_what_is_no_number_or_no_key_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.columns\.prompt"):
        changed(DEFAULTS, ["data.columns.prompt=${x}"])
    for size in ("nan", "0", "-5"):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse says the rest
            size_of_gpu(size)
    (tmp_path / "metrics.jsonl").write_text('5\n{"step": 1}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_conversation_shows_special_tokens_of_an_answer(tokenizer, monkeypatch, capsys) -> None:
    ids = tokenizer.convert_tokens_to_ids(["<|begin|>", "a", "<|end|>"])
    said_by_user = iter(["q", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said_by_user))

    def answer(row: dict, streamer) -> str:
        for value in (torch.tensor([ids]), *(torch.tensor([each]) for each in ids)):
            streamer.put(value)
        streamer.end()
        return "a"

    _chat(answer, tokenizer, [])
    assert capsys.readouterr().out == "<|begin|>a\n"


def test_a_column_that_python_cannot_hold_costs_no_row(tmp_path: Path) -> None:
    far = pa.array([2**40], pa.timestamp("s"))  # the year 36812
    table = pa.table({"prompt": ["q"], "completion": ["a"], "when": far})
    pq.write_table(table, tmp_path / "r.parquet")
    (row,) = read(str(tmp_path / "r.parquet"))
    assert [m["content"] for m in row["messages"]] == ["q", "a"]


def test_a_checkpoint_can_be_copied_with_its_config(smoke: Path, tmp_path: Path) -> None:
    newest = sorted((smoke / "checkpoints").glob("step-*"))[-1]
    copy = shutil.copytree(newest, tmp_path / "kept")
    shutil.copy(smoke / "config.yaml", copy)
    assert find_trained(str(copy)).kind == "checkpoint"


def test_what_an_earlier_version_trained_is_asked_though_a_key_is_gone(
    smoke: Path, tmp_path
) -> None:
    result = shutil.copytree(smoke / "final", tmp_path / "final")
    with (result / RECIPE).open("a") as file:
        file.write("removed: 1\n")
    found, whole = find_trained(str(result)).config, find_trained(str(smoke)).config
    assert found.model_dump() == whole.model_dump()


def test_an_adapter_that_names_no_base_says_how_to_name_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="names no base model; give it with --base"):
        find_trained(str(tmp_path))


def test_answers_and_reports_find_their_place_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(chat("q", "a")))
    with pytest.raises(UserError, match=r"--output: .*file: cannot be written: Not a directory"):
        check_answers(str(rows), tmp_path / "file" / "answers.jsonl", DATA, "m")
    (tmp_path / "evaluation.json").write_text('{"da')
    (tmp_path / "evaluation.md").write_text("mine")
    scores = {"model": {"loss": 1.0}}
    write_evaluation({"data": "d", "rows": 1, "scores": scores, "samples": []}, tmp_path)
    assert (tmp_path / "evaluation-1.md").read_text() == "mine"


def test_a_run_of_more_steps_than_its_new_config_has_is_refused(train) -> None:
    train("training.max_steps=2")
    with pytest.raises(UserError, match="2 steps are done, and this configuration has 1"):
        train("training.max_steps=1", "training.resume=auto")
