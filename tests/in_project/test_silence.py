"""Inputs that would be trained, asked or overwritten without a word, and tracebacks that were."""

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import scripts.compare
from conftest import SMOKE, chat, turn, write_lines
from scripts.inference import _chat
from scripts.plan import size_of_gpu
from src.config import DEFAULTS, DataConfig, LoraConfig, ModelConfig, changed, load_config
from src.data import answers
from src.data import rows as rows_module
from src.data.answers import check_answers, read_question
from src.data.batching import collate_packed
from src.data.dataset import Facts, load_tokens, read_part
from src.models.adapters import add_adapters
from src.models.model import load_tokenizer
from src.tools.evaluate import write_evaluation
from src.trained import find_trained
from src.training import record, report
from src.training import run as run_module
from src.training.checkpoint import identify
from src.training.record import read_metrics
from src.utils.errors import RunError, UserError
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


def test_a_column_that_is_mapped_makes_up_no_other_shape(tmp_path: Path) -> None:
    raw = {"question": "q", "passage": "p", "answer": "a", "more": 1}
    (tmp_path / "r.jsonl").write_text(json.dumps(raw))
    columns = {"instruction": "question", "input": "passage", "output": "answer"}
    (row,) = read(str(tmp_path / "r.jsonl"), columns=columns)
    assert [m["content"] for m in row["messages"]] == ["q\n\np", "a"]
    assert row["unread"] == ["more"]
    assert read_question(raw, DataConfig(train="-", columns=columns))["unread"] == ["more"]


def test_columns_beside_those_that_are_mapped_are_read_as_before(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "r.jsonl").write_text('{"question": "q", "context": "c", "answer": "a"}')
    for columns in ({"input": "context"}, {"prompt": "question"}):
        (row,) = read(str(tmp_path / "r.jsonl"), columns=columns)
        assert [m["content"] for m in row["messages"]] == ["q\n\nc", "a"]
    (tmp_path / "r.jsonl").write_text('{"input": "i", "query": "q", "output": "o"}')
    adapt = lambda raw: {"instruction": raw["query"], "input": raw["text"], "output": raw["output"]}  # noqa: E731
    monkeypatch.setattr(rows_module, "adapt", adapt)
    (row,) = read(str(tmp_path / "r.jsonl"), columns={"text": "input"})
    assert [m["content"] for m in row["messages"]] == ["q\n\ni", "o"]


def test_a_label_of_a_text_is_no_rejected_answer_and_that_of_messages_is(tmp_path: Path) -> None:
    rejected = chat("q", "a") | {"label": False}
    write_lines(tmp_path / "r.jsonl", {"text": "hello", "label": False}, rejected)
    (row,) = read(str(tmp_path / "r.jsonl"))
    assert row["text"] == "hello"


def test_keys_of_the_data_are_changed_whatever_the_rest_of_the_config_is(tmp_path: Path) -> None:
    text = Path(SMOKE).read_text().replace("training:", "training:\n  patience: 3")
    (tmp_path / "c.yaml").write_text(text + "evaluation: {prompts: ['\\${x}']}\n")
    with pytest.raises(UserError, match=r"training\.patience"):
        load_config(tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml", stored=True)
    data = changed(config, ["data.columns.prompt=p", "data.columns.completion=c"], "data.").data
    assert data.columns == {"prompt": "p", "completion": "c"}
    assert data.train == config.data.train


def test_a_large_share_holds_out_all_rows_but_one_at_the_most(tmp_path: Path) -> None:
    write_lines(tmp_path / "r.jsonl", *[chat(f"q{n}", "a") for n in range(2)])
    data = DataConfig(train=str(tmp_path / "r.jsonl"), eval=0.9)
    assert [len([*read_part(data.train, data, part)]) for part in ("train", "eval")] == [1, 1]


def test_the_labels_of_a_split_text_are_counted_as_the_loss_counts_them(
    tmp_path, tokenizer
) -> None:
    write_lines(tmp_path / "r.jsonl", {"text": "word " * 20})
    data = DataConfig(train=str(tmp_path / "r.jsonl"), max_length=8)
    rows = load_tokens(data.train, tokenizer, data)
    batch = collate_packed(rows[[*range(len(rows))]], 8 * len(rows), 8, 0)
    assert len(rows) > 2
    assert rows.facts.labelled_tokens == batch["labelled"]


def test_adapters_do_not_go_on_as_all_weights(smoke: Path, tmp_path) -> None:
    changes = ["model.init=pretrained", f"model.name={smoke / 'final'}"]
    config = load_config(SMOKE, changes)
    whole, adapted = (
        identify(changed(config, [keys]), Facts()) for keys in ("lora=null", "lora.r=4")
    )
    assert {key for key in whole if whole[key] != adapted.get(key, whole[key])} == {"lora=null"}


def test_a_diff_of_any_bytes_is_kept_and_that_of_an_earlier_start_is_not(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(record, "PROJECT_ROOT", tmp_path)
    (tmp_path / "mine.py").write_text("# a")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True
        )
    (tmp_path / "mine.py").write_bytes("# é".encode("latin-1"))
    (tmp_path / "run").mkdir()
    diff = tmp_path / "run/uncommitted.diff"
    record.start_record(tmp_path / "run", {}, {}, 0)
    assert "+# \ufffd" in diff.read_text()
    (tmp_path / "mine.py").write_text("# a")
    record.start_record(tmp_path / "run", {}, {}, 1)
    assert diff.exists(), "of the first steps of this run"
    record.start_record(tmp_path / "run", {}, {}, 0)
    assert not diff.exists()
    diff.write_text("mine")
    monkeypatch.setattr(record, "git", lambda *_: None)
    record.start_record(tmp_path / "run", {}, {}, 0)
    assert diff.exists(), "git fails"


def test_a_record_that_somebody_removed_hides_no_other_error(train, monkeypatch) -> None:
    def fail(run, *_: object) -> None:
        (run.folder / "record.json").unlink()
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "save_checkpoint", fail)
    with pytest.raises(ZeroDivisionError):
        train("training.max_steps=1")


def test_a_record_that_cannot_be_finished_is_an_error(train, monkeypatch) -> None:
    def fail(*_: object, **facts: object) -> None:
        if facts.get("status") == "FINISHED":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "update_record", fail)
    with pytest.raises(RunError, match="No space left on device"):
        train("training.max_steps=1", "training.resume=auto")


def test_a_run_says_that_there_is_nothing_to_go_on_from(train, capsys) -> None:
    folder = train("training.max_steps=1", "training.resume=auto")
    assert f"resume     nothing to go on from in {folder}: a new run\n" in capsys.readouterr().out


def test_a_start_that_was_killed_before_its_first_checkpoint_leaves_no_samples(train) -> None:
    options = ["training.max_steps=1", "training.save_every=null", "evaluation.samples=1"]
    folder = train(*options)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    train(*options, "training.resume=auto")
    steps = [json.loads(line)["step"] for line in (folder / "samples.jsonl").open()]
    assert steps == [0, 1]


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
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="names no base model; give it with --base"):
        find_trained(str(tmp_path))


def test_answers_and_reports_find_their_place_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(chat("q", "a")))
    with pytest.raises(UserError, match=r"--output: .*file: cannot be written: Not a directory"):
        check_answers(str(rows), tmp_path / "file" / "answers.jsonl", DATA, "m")
    (tmp_path / "answers.jsonl").touch()
    monkeypatch.setattr(answers, "write_problem", lambda _: "its folder")
    assert check_answers(str(rows), tmp_path / "answers.jsonl", DATA, "m") == (0, 1)
    (tmp_path / "evaluation.json").write_text('{"da')
    (tmp_path / "evaluation.md").write_text("mine")
    scores = {"model": {"loss": 1.0}}
    write_evaluation({"data": "d", "rows": 1, "scores": scores, "samples": []}, tmp_path)
    assert (tmp_path / "evaluation-1.md").read_text() == "mine"


def test_a_run_of_more_steps_than_its_new_config_has_is_refused(train) -> None:
    train("training.max_steps=2")
    with pytest.raises(UserError, match="2 steps are done, and this configuration has 1"):
        train("training.max_steps=1", "training.resume=auto")
