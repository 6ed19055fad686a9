"""Answers are complete, without their prompt, and the same alone or in a batch."""

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from src.models.generation import generate
from src.models.model import save_model
from src.trained import load_trained


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
    model = make_model(packing=False)
    answer = tokenizer("some answer", return_tensors="pt")["input_ids"]
    asked = {}

    def stub(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.update(
            options, length=input_ids.shape[1], inference=torch.is_inference_mode_enabled()
        )
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(model, "generate", stub)
    assert generate(model, tokenizer, "a long prompt " * 10, max_length=12) == "some answer"
    assert asked["max_new_tokens"] == 12 < asked["length"]
    assert asked["inference"]
    assert asked["eos_token_id"] == [tokenizer.eos_token_id]


def test_a_model_that_knows_no_sdpa_is_loaded_and_answers(tmp_path, tokenizer) -> None:
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "m", torch.float32)
    model, saved = load_trained(tmp_path / "m", torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
    assert isinstance(generate(model, saved, "Hi", max_length=2), str)
