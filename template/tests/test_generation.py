"""Answers are complete, without their prompt, and the same alone or in a batch."""

from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from src.models import generation
from src.models.generation import generate
from src.models.model import save_model, set_generation_config
from src.trained import find_trained, load_trained

CPU = torch.device("cpu")


def test_prompts_of_any_kind_and_length_get_in_a_batch_what_each_gets_alone(
    make_model, tokenizer
) -> None:
    model = make_model(lora=True).train()
    asked = ["the role of x", *("word " * (n * 7 % 23) + "?" for n in range(6))]
    turns = [[{"role": "user", "content": question}] for question in asked]
    alone = [generate(model, tokenizer, question, max_length=6) for question in asked]
    assert len(set(alone)) > 1
    for prompts in (asked, [{"messages": each} for each in turns]):
        assert generate(model, tokenizer, prompts, max_length=6, batch_size=4) == alone
        assert generate(model, tokenizer, prompts[0], max_length=6) == alone[0]
    assert model.training
    assert model.config._attn_implementation == "varlen", "restored"


@pytest.fixture
def speaking(make_model, tokenizer, monkeypatch):
    """Make a model that says the same to all prompts: `speaking(ids, …)`; and what it was given."""

    def make(*answers: list[int]):
        model, seen = make_model(packing=False).eval(), {}

        def stub(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            seen.update(options, length=input_ids.shape[1], config=model.generation_config)
            seen["inference"] = torch.is_inference_mode_enabled()
            return torch.cat([input_ids, torch.tensor(answers)], dim=1)

        monkeypatch.setattr(model, "generate", stub)
        return model, seen

    return make


@pytest.mark.parametrize("said", ["    indented", "\n\nafter blanks  ", "<|begin|> is a token"])
def test_an_answer_is_all_that_follows_the_prompt_up_to_a_stop_token(
    speaking, tokenizer, monkeypatch, said: str
) -> None:
    stops = [tokenizer.eos_token_id, 300]
    monkeypatch.setattr(generation, "stops_of", lambda *_: stops)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    model, seen = speaking(*([*ids, stop, 5] for stop in stops))
    asked = ["a long prompt " * 10, "b"]
    assert generate(model, tokenizer, asked, max_length=12) == [said, said]
    assert seen["max_new_tokens"] == 12 < seen["length"]
    assert seen["inference"]
    assert seen["config"].eos_token_id == stops


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_trains_answers_outside_of_inference_mode(
    make_model, tokenizer, training: bool
) -> None:
    model, kept = make_model(packing=False), []

    def scale(_, __, hidden):
        if not kept:  # as some models keep tables that they make at their first call
            kept.append(torch.ones_like(hidden[0, 0]))
        return hidden * kept[0]

    model.model.norm.register_forward_hook(scale)
    generate(model.train(training), tokenizer, "Hi", max_length=2)
    assert kept[0].is_inference() != training
    if training:  # else torch refuses to save an inference tensor for the backward pass
        model(torch.arange(8)[None]).logits.sum().backward()


SETTINGS = {
    "repetition_penalty": 9.0, "min_new_tokens": 6, "suppress_tokens": list(range(256)),
    "num_beams": 3, "do_sample": True, "top_k": 5, "no_repeat_ngram_size": 1,
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
def test_the_answer_is_the_likeliest_whatever_the_base_has_set(
    make_model, tokenizer, lora: bool
) -> None:
    model = make_model(packing=False, lora=lora).eval()
    model.generation_config.update(**SETTINGS)
    kept = model.generation_config
    ids = tokenizer("word " * 3, return_tensors="pt")["input_ids"]
    prompt, expected = ids.shape[1], ids
    with torch.no_grad():
        for _ in range(5):
            following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
    answer = generate(model, tokenizer, {"text": "word " * 3}, max_length=5)
    assert answer == tokenizer.decode(expected[0, prompt:])
    assert model.generation_config is kept
    if lora:
        assert model.get_base_model().generation_config is kept


def test_a_temperature_draws_from_all_tokens(make_model, tokenizer) -> None:
    model = make_model(packing=False).eval()
    torch.manual_seed(0)
    with mock.patch.object(tokenizer.__class__, "decode", lambda _, ids: " ".join(map(str, ids))):
        prompts = [{"text": "x"}] * 200
        drawn = generate(model, tokenizer, prompts, 1, temperature=50.0, batch_size=200)
    assert len(set(drawn)) > 100, "transformers' own top_k is 50"


def test_the_bases_other_stop_tokens_are_kept(make_model, tokenizer) -> None:
    model, begin = make_model(packing=False), tokenizer.convert_tokens_to_ids("<|begin|>")
    model.generation_config.eos_token_id = [begin, 300]  # of which 300 is an ordinary token here
    set_generation_config(model, tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, begin]


def test_a_saved_folder_says_where_answers_end_and_gets_a_template_if_it_has_none(
    make_model, tokenizer, tmp_path
) -> None:
    save_model(make_model(lora=True), tokenizer, tmp_path / "a", torch.bfloat16)
    assert GenerationConfig.from_pretrained(tmp_path / "a").eos_token_id == [tokenizer.eos_token_id]
    save_model(make_model(), tokenizer, tmp_path / "m", torch.float32)
    (tmp_path / "m/chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template is None
    _, loaded = load_trained(find_trained(str(tmp_path / "m")), CPU)
    assert loaded.chat_template == tokenizer.chat_template
