"""Answers are complete, without their prompt, and the same alone or in a batch."""

from unittest import mock

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
)

from src.models import generation
from src.models.generation import generate, is_compiled_for
from src.models.model import save_model, set_generation_config
from src.trained import load_trained
from src.utils.errors import UserError


def test_a_batch_of_prompts_gets_the_answers_each_gets_alone(make_model, tokenizer) -> None:
    model = make_model()
    model.train()
    prompts = [
        "Hi",
        "A much longer question than the first one was",
        [{"role": "user", "content": "x"}],
    ]
    together = generate(model, tokenizer, prompts, max_length=8)
    alone = [generate(model, tokenizer, prompt, max_length=8) for prompt in prompts]
    assert together == alone
    assert model.training
    assert model.config._attn_implementation == "varlen", "put back as it was"


def test_generation_counts_new_tokens_and_returns_no_prompt(
    make_model, tokenizer, monkeypatch
) -> None:
    model = make_model(packing=False).eval()
    answer = tokenizer("some answer", return_tensors="pt")["input_ids"]
    asked = {}

    def stub(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.update(
            options, length=input_ids.shape[1], inference=torch.is_inference_mode_enabled(),
            stops=model.generation_config.eos_token_id,
        )  # fmt: skip
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(model, "generate", stub)
    assert generate(model, tokenizer, "a long prompt " * 10, max_length=12) == "some answer"
    assert asked["max_new_tokens"] == 12 < asked["length"]
    assert asked["inference"]
    assert asked["stops"] == [tokenizer.eos_token_id]


def test_a_model_that_knows_no_sdpa_is_loaded_and_answers(tmp_path, tokenizer) -> None:
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "m", torch.float32)
    model, saved = load_trained(tmp_path / "m", torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
    assert isinstance(generate(model, saved, "Hi", max_length=2), str)


def test_an_answer_ends_at_either_of_two_stop_tokens(make_model, tokenizer, monkeypatch) -> None:
    model = make_model(packing=False)
    first, second = 1, tokenizer.convert_tokens_to_ids("<|begin|>")
    monkeypatch.setattr("src.models.generation.stops_of", lambda *_: [first, second])
    said = tokenizer("said", add_special_tokens=False)["input_ids"]
    rows = [[*said, first, *said], [*said, second, *said]]
    asked = {}

    def stub(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.update(stops=model.generation_config.eos_token_id)
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", stub)
    assert generate(model, tokenizer, ["a", "b"]) == ["said", "said"]
    assert asked["stops"] == [first, second]


def test_many_prompts_of_any_length_are_answered_in_their_order(make_model, tokenizer) -> None:
    model = make_model(lora=True)
    prompts = ["word " * (n * 7 % 23) + "?" for n in range(11)]
    alone = [generate(model, tokenizer, prompt, max_length=6) for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_length=6, batch_size=4) == alone
    assert len(set(alone)) > 1


def test_a_long_job_is_answered_in_few_shapes_with_the_same_answers(
    make_model, tokenizer, monkeypatch
) -> None:
    model, shapes = make_model(packing=False).eval(), set()
    prompts = [f"{'why ' * (9 * n)}{n}?" for n in range(11)]
    expected = generate(model, tokenizer, prompts, max_length=8, batch_size=4)
    monkeypatch.setattr(generation, "is_compiled_for", lambda *_: True)
    model.register_forward_pre_hook(
        lambda _, __, given: shapes.add(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    assert generate(model, tokenizer, prompts, max_length=8, batch_size=4) == expected
    assert shapes == {(4, 128), (4, 256), (4, 1)}


def test_answers_are_compiled_on_a_gpu_for_long_jobs_only(make_model, monkeypatch) -> None:
    model = make_model(packing=False).eval()
    assert not is_compiled_for(model, 10_000), "a CPU"
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert [is_compiled_for(model, steps) for steps in (256, 10_000)] == [False, True]
    assert not is_compiled_for(model.train(), 10_000)


def test_where_answers_cannot_be_compiled_they_are_given_all_the_same(
    make_model, tokenizer, monkeypatch, capsys
) -> None:
    model = make_model(packing=False).eval()
    expected = generate(model, tokenizer, ["a", "b"], max_length=4)
    real = type(model).generate

    def without_compiler(self, *args, cache_implementation=None, **options):
        if cache_implementation:
            raise RuntimeError("no C compiler\nat all")
        return real(self, *args, **options)

    monkeypatch.setattr(type(model), "generate", without_compiler)
    monkeypatch.setattr(generation, "is_compiled_for", lambda *_: True)
    assert generate(model, tokenizer, ["a", "b"], max_length=4) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: answers are not compiled: RuntimeError: no C compiler"


def test_tools_reach_the_template(make_model, tokenizer, monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(
        "src.models.generation.chat_text", lambda _, m, __, tools: seen.update(t=tools) or "x"
    )
    generate(make_model(), tokenizer, "Hi", max_length=1, tools=[{"name": "look"}])
    assert seen == {"t": [{"name": "look"}]}


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


@pytest.fixture
def gpt2(tokenizer):
    """A model with a table of 32 positions."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = GPT2Config(vocab_size=512, eos_token_id=1, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def test_an_answer_ends_where_the_models_positions_do(gpt2, tokenizer) -> None:
    prompt = "x " * 10
    asked = len(tokenizer(prompt)["input_ids"])
    with mock.patch.object(gpt2, "generate", wraps=gpt2.generate) as complete:
        generate(gpt2, tokenizer, prompt, max_length=256, raw=True)
    assert complete.call_args.kwargs["max_new_tokens"] == 32 - asked
    generate(gpt2, tokenizer, prompt, max_length=4, raw=True)
    with pytest.raises(UserError, match=r"a prompt of \d+ tokens fills the model's 32 positions"):
        generate(gpt2, tokenizer, "x " * 40, raw=True)


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
    answer = generate(model, tokenizer, "word " * 3, max_length=5, raw=True)
    assert answer == tokenizer.decode(expected[0, prompt:])
    assert model.generation_config is kept
    if lora:
        assert model.get_base_model().generation_config is kept


def test_a_temperature_draws_from_all_tokens(make_model, tokenizer) -> None:
    model = make_model(packing=False).eval()
    torch.manual_seed(0)
    with mock.patch.object(tokenizer.__class__, "decode", lambda _, ids: " ".join(map(str, ids))):
        drawn = generate(
            model, tokenizer, ["x"] * 200, max_length=1, raw=True, temperature=50.0, batch_size=200
        )
    assert len(set(drawn)) > 100, "transformers' own top_k is 50"


@pytest.mark.parametrize("said", ["    indented", "\n\nafter blanks  ", "<|begin|> is a token"])
def test_an_answer_is_given_back_as_it_is(make_model, tokenizer, monkeypatch, said: str) -> None:
    model = make_model(packing=False)
    ids = tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
    stop = torch.tensor([[tokenizer.eos_token_id, 5]])
    stub = lambda input_ids, **_: torch.cat([input_ids, ids, stop], dim=1)  # noqa: E731
    monkeypatch.setattr(model, "generate", stub)
    assert generate(model, tokenizer, "Hi") == said


def test_the_bases_other_stop_tokens_are_kept(make_model, tokenizer) -> None:
    model, begin = make_model(packing=False), tokenizer.convert_tokens_to_ids("<|begin|>")
    model.generation_config.eos_token_id = [begin, 300]  # of which 300 is an ordinary token here
    set_generation_config(model, tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, begin]


def test_an_adapters_folder_says_where_answers_end(make_model, tokenizer, tmp_path) -> None:
    save_model(make_model(lora=True), tokenizer, tmp_path / "m", torch.bfloat16)
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [tokenizer.eos_token_id]


def test_a_local_base_without_a_template_is_asked_as_it_would_be_trained(
    make_model, tokenizer, tmp_path
) -> None:
    save_model(make_model(), tokenizer, tmp_path / "m", torch.float32)
    (tmp_path / "m/chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template is None
    _, loaded = load_trained(tmp_path / "m", torch.device("cpu"))
    assert loaded.chat_template == tokenizer.chat_template


def test_a_list_of_questions_is_never_taken_for_a_conversation(make_model, tokenizer) -> None:
    model = make_model(packing=False)
    asked = ["the role of x", "y"]
    assert len(generate(model, tokenizer, asked, max_length=1)) == 2
    rows = [{"messages": [{"role": "user", "content": each}]} for each in asked]
    assert generate(model, tokenizer, rows, max_length=1) == generate(
        model, tokenizer, asked, max_length=1
    )
    assert isinstance(generate(model, tokenizer, rows[0], max_length=1), str)
    assert isinstance(generate(model, tokenizer, rows[0]["messages"], max_length=1), str)
