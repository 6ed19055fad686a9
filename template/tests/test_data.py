"""Tokens, labels and batches are what the loss believes they are."""

from __future__ import annotations

import copy
import errno
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from conftest import ROOT, chat
from src.data import IGNORE, cache, dataset
from src.data.batching import TokenBudgetSampler, collate_packed, collate_padded, pack
from src.data.cache import was_tokenised
from src.data.dataset import load_tokens
from src.data.encoding import encode, stop_token_ids
from src.utils.errors import RunError, UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chatml():
    """A tokenizer whose template closes turns with a token that is not its EOS, as Qwen's."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def labelled_text(tokenizer, row: dict) -> str:
    ((ids, labels),) = encode([row], tokenizer)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORE])


TWO_TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second answer."},
    ]
}


def test_only_the_assistant_and_its_stop_token_carry_loss(tokenizer) -> None:
    assert labelled_text(tokenizer, TWO_TURNS) == "First answer.<|end|>Second answer.<|end|>"


def test_a_template_without_generation_marks_is_masked_by_its_turns(chatml) -> None:
    assert labelled_text(chatml, TWO_TURNS) == "First answer.<|im_end|>\nSecond answer.<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(chatml) -> None:
    chatml.chat_template = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(UserError, match=r"row 1: the chat template rewrites message 3"):
        encode([TWO_TURNS], chatml)


def test_text_rows_carry_loss_everywhere_and_end_with_the_stop_token(tokenizer) -> None:
    ((ids, labels),) = encode([{"text": "Once upon"}], tokenizer)
    assert tokenizer.decode(ids) == "Once upon<|end|>"
    assert labels == [IGNORE, *ids[1:]], "nothing predicts the first token"


def test_there_is_exactly_one_bos(tokenizer) -> None:
    for row in (TWO_TURNS, {"text": "Once"}):
        ((ids, _),) = encode([row], tokenizer)
        # This tokenizer adds none by itself; its template writes one.
        assert ids.count(tokenizer.bos_token_id) == ("messages" in row)


def test_what_generation_is_given_is_a_prefix_of_what_was_trained(tokenizer) -> None:
    messages = TWO_TURNS["messages"]
    ((ids, labels),) = encode([{"messages": messages[:3]}], tokenizer)
    prompt = tokenizer.apply_chat_template(
        messages[:2], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]


def test_generation_stops_where_the_template_ends_a_turn(chatml, tokenizer) -> None:
    ids = stop_token_ids(chatml)
    assert ids == [chatml.eos_token_id, chatml.convert_tokens_to_ids("<|im_end|>")]
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_truncation_is_counted_and_rows_without_labels_are_left_out(tokenizer, write_rows) -> None:
    rows = [chat("q", "a"), chat("q", "word " * 60), chat("long " * 60, "a")]
    data = load_tokens(write_rows(*rows), tokenizer, max_length=64)
    assert (len(data), data.truncated, data.dropped) == (2, 2, 1)
    assert data.lengths.tolist()[1] == 64
    with pytest.raises(UserError, match=r"nothing to learn from: in all 1 rows"):
        load_tokens(write_rows(rows[2], name="long.jsonl"), tokenizer, max_length=64)


def test_tokens_are_reused_until_rows_template_length_or_code_change(
    tokenizer, write_rows, monkeypatch
) -> None:
    calls = []
    real = dataset.encode
    monkeypatch.setattr(dataset, "encode", lambda *a, **k: calls.append(1) or real(*a, **k))
    file = write_rows(chat("q", "a"), chat("r", "b"))
    for expected, changed in [(1, 64), (1, 64), (2, 65)]:
        load_tokens(file, tokenizer, max_length=changed)
        assert len(calls) == expected
    write_rows(chat("q", "other"))
    load_tokens(file, tokenizer, max_length=64)
    assert len(calls) == 3
    other = copy.copy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("Assistant", "Answer")
    load_tokens(file, other, max_length=64)
    assert len(calls) == 4
    monkeypatch.setattr(cache, "CODE", ("rows.py",))  # as if encoding.py had other lines
    load_tokens(file, tokenizer, max_length=64)
    assert len(calls) == 5


def test_a_file_whose_rows_were_all_read_is_known_again_until_it_changes(
    tokenizer, write_rows, tmp_path: Path
) -> None:
    file = write_rows(chat("q", "known"), chat("r", "b"))
    load_tokens(file, tokenizer, max_length=64, limit=1)
    assert not was_tokenised(file), "its second row was not read"
    load_tokens(file, tokenizer, max_length=64)
    assert was_tokenised(file)
    renamed = shutil.copy(file, tmp_path / "rows.csv")
    assert not was_tokenised(str(renamed)), "the suffix decides how it is read"
    with Path(file).open("a") as rows:
        rows.write('{"text": 5}\n')
    assert not was_tokenised(file)
    for missing in ("no/such.jsonl", "some/hub-id", str(tmp_path)):
        assert not was_tokenised(missing)


def test_known_rows_are_not_read_again_before_a_start(tokenizer, write_rows, monkeypatch) -> None:
    from src import preflight
    from src.config import load_config

    file = write_rows(chat("q", "not read again"))
    config, _ = load_config(ROOT / "configs/smoke.yaml", [f"data.train={file}", "data.eval=null"])
    read = []
    monkeypatch.setattr(preflight, "check_source", lambda key, source: read.append(source))
    preflight.check_run(config)
    load_tokens(file, tokenizer, max_length=64)
    preflight.check_run(config)
    assert read == [file]


def test_the_fingerprint_is_that_of_the_tokens_alone(tokenizer, write_rows) -> None:
    one = load_tokens(write_rows(chat("q", "a")), tokenizer, max_length=64)
    same = load_tokens(write_rows("", chat("q", "a"), name="b.jsonl"), tokenizer, max_length=65)
    other = load_tokens(write_rows(chat("q", "b"), name="c.jsonl"), tokenizer, max_length=64)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_tokens_that_cannot_be_written_whole_leave_nothing(
    tokenizer, write_rows, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    bad = write_rows(*[chat("q", "a")] * 1500, {"text": 5})  # the first batch is written by then
    with pytest.raises(UserError, match="`text` must be text"):
        load_tokens(bad, tokenizer, max_length=64)

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset, "write_text", fails)
    with pytest.raises(RunError, match="cannot be written: No space left on device; HF_HOME"):
        load_tokens(write_rows(chat("q", "a")), tokenizer, max_length=64)
    left = [path.name for path in (tmp_path / "tokens").iterdir()]
    assert all(name.endswith(".lock") for name in left), left


def test_workers_map_the_tokens_again(tokenizer, write_rows) -> None:
    data = load_tokens(write_rows(*[chat("q", "a " * 20)] * 500), tokenizer, max_length=64)
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000, "a copy of all tokens for each worker"
    for (ids, labels), (same_ids, same_labels) in zip(
        data.documents([3, 7]), pickle.loads(pickled).documents([3, 7]), strict=True
    ):
        assert (ids == same_ids).all()
        assert (labels == same_labels).all()


def test_rows_of_the_hub_are_tokenised_once_and_a_missing_dataset_is_one_line(
    tokenizer, monkeypatch
) -> None:
    with pytest.raises(UserError, match=r"some/where: not found on the hub and not in its cache"):
        load_tokens("some/where", tokenizer, max_length=64)
    rows = datasets.Dataset.from_list([chat("q", "a"), chat("r", "b")])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    data = load_tokens("some/where:test", tokenizer, max_length=64)
    assert len(data) == 2
    assert asked[0] == (("some/where",), {"split": "test"})
    monkeypatch.setattr(dataset, "read_rows", None)
    assert len(load_tokens("some/where:test", tokenizer, max_length=64)) == 2


def short_chats(count: int) -> np.ndarray:
    """Lengths of short chats: median about 60 tokens, some near 512."""
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(4.1, 0.8, count), 8, 512).astype(int)


def test_packing_loses_no_document_and_wastes_under_three_percent() -> None:
    lengths = short_chats(5000)
    rows = pack(lengths, np.random.default_rng(1).permutation(5000), 4 * 512)
    assert sorted(d for row in rows for d in row) == list(range(5000))
    assert all(lengths[row].sum() <= 2048 for row in rows)
    assert lengths.sum() / (len(rows) * 2048) > 0.97


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def walk(seed: int, epoch: int) -> list:
        sampler = TokenBudgetSampler(short_chats(400), 512, 4, packing=True, seed=seed)
        sampler.epoch = epoch
        return list(sampler)

    assert walk(1, 1) == walk(1, 1)
    assert walk(1, 1) != walk(1, 2)
    assert sorted(map(sorted, walk(1, 1))) == sorted(map(sorted, walk(1, 2)))
    assert sorted(map(sorted, walk(1, 1))) != sorted(map(sorted, walk(2, 1)))


def test_a_resumed_sampler_goes_on_where_it_stopped() -> None:
    sampler = TokenBudgetSampler(short_chats(400), 512, 4, packing=True, seed=3)
    sampler.epoch = 2
    whole = list(sampler)
    sampler.position = 4
    assert list(sampler) == whole[4:]
    assert len(sampler) == len(whole)


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_the_batches_equally_and_completely(packing: bool) -> None:
    def make(rank: int, world: int) -> TokenBudgetSampler:
        return TokenBudgetSampler(
            short_chats(401), 512, 4, packing=packing, seed=0, rank=rank, world_size=world
        )

    alone = list(make(0, 1))
    ranks = [list(make(rank, 3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    merged = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert [batch for batch in merged if batch] == alone


def test_the_batch_that_needs_the_most_memory_comes_first() -> None:
    lengths = short_chats(400)
    sampler = TokenBudgetSampler(lengths, 512, 4, packing=False, seed=0)
    sizes = [max(lengths[batch]) * len(batch) for batch in sampler]
    assert sizes[0] == max(sizes)


def documents(*lengths: int) -> list:
    return [(np.arange(n) + 10, np.arange(n) + 10) for n in lengths]


def test_a_packed_batch_always_has_the_same_number_of_tokens() -> None:
    for lengths in [(), (5,), (16, 16), (3, 4, 5, 6)]:
        batch = collate_packed(documents(*lengths), 32, 16, pad_id=0)
        assert batch["input_ids"].shape == batch["labels"].shape == (1, 32)
        assert batch["tokens"] == sum(lengths)
        assert batch["labelled"] == sum(n - 1 for n in lengths)
        starts = batch["cu_seq_lens_q"].tolist()
        assert (batch["labels"][0, [s for s in starts if s < 32]] == IGNORE).all()
        assert (batch["position_ids"][0, [s for s in starts if s < 32]] == 0).all()
        assert starts[-1] == 32
        assert max(np.diff(starts)) <= 16


def test_padding_carries_no_label_even_where_it_equals_the_stop_token() -> None:
    batch = collate_padded(documents(5, 3), 64, pad_id=12)
    assert batch["input_ids"].shape == (2, 64)
    assert batch["labels"][1].tolist()[:4] == [10, 11, 12, IGNORE]
    assert batch["labelled"] == 4 + 2
