"""Answers from a model, under inference_mode: one prompt, a batch of them, or a stream."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from itertools import batched
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig

from src.data.chat import chat_text
from src.models.adapters import base_dtype, without_input_casts
from src.models.model import position_limit, stops_of
from src.utils.device import autocast
from src.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.generation.streamers import BaseStreamer

LONG_JOB = 2000  # decoding steps: 20 s for a model of 1 billion parameters on an H200

Prompt = str | list[dict[str, Any]] | dict[str, Any]  # the last: `messages` and `tools` of a row


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: Prompt | list[Prompt],
    max_length: int = 256, *, raw: bool = False, temperature: float = 0.0, top_p: float = 1.0,
    tools: list[dict] | None = None, batch_size: int = 16, streamer: BaseStreamer | None = None,
    dtype: torch.dtype | None = None,
) -> str | list[str]:  # fmt: skip
    """Complete one prompt, or many, those of similar length together.

    The model's own generation config (repetition_penalty, top_k, …) does not act. It runs in
    `inference_mode`, except for a model in training mode: tensors that a model caches in
    `inference_mode` cannot take part in a later backward pass.

    Args:
        model: a causal language model, with or without adapters, in any mode; its mode and its
            attention are put back afterwards.
        tokenizer: the one it was trained with.
        prompt: a user's question, or a list of questions; each may be a list of messages, or an
            object with `messages` and the `tools` that go with them.
        max_length: how many *new* tokens at most, unlike transformers' own `max_length`. A model
            with a table of positions (GPT-2) also stops at its end.
        raw: continue the text as it is, without the chat template.
        temperature: 0 takes the likeliest token each time; above, it samples.
        top_p: sample from the likeliest tokens that add up to this probability.
        tools: what the model may call, for templates that write it.
        batch_size: prompts at a time.
        streamer: receives tokens as they come (one prompt only), e.g. a `TextStreamer`.
        dtype: that matmuls run in, by autocast, as in training; None: that of the base's weights.

    Returns:
        What follows the prompt, up to the stop token and otherwise as it is; a list for a list.

    Raises:
        UserError: a prompt leaves no position for an answer, or the template refuses it.
    """
    conversation = isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)
    single = isinstance(prompt, str | dict) or (conversation and "role" in prompt[0])
    prompts: list[Any] = [prompt] if single else list(prompt)
    raw = raw or tokenizer.chat_template is None
    texts = [_as_text(each, tokenizer, raw, tools) for each in prompts]
    own = GenerationConfig(eos_token_id=stops_of(model, tokenizer))
    if temperature > 0:  # top_k=0: else transformers draws from the 50 likeliest alone
        own.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    steps = -(-len(texts) // batch_size) * max_length
    rows = batch_size if is_compiled_for(model, steps) else 0
    complete = partial(_complete, model, tokenizer, raw, max_length, streamer)
    with _inference_state(model, own, dtype, compiling=rows > 0):
        answers = _in_batches(complete, texts, batch_size, rows)
    return answers[0] if single else answers


def _in_batches(
    complete: Callable[[list[str], int], list[str]], texts: list[str], size: int, rows: int
) -> list[str]:
    """Answer the longest first: what does not fit is known at once, and lengths are similar."""
    order, answers = sorted(range(len(texts)), key=lambda n: -len(texts[n])), {}
    for some in batched(order, size):
        here = [texts[n] for n in some]
        try:
            said = complete(here, rows)
        except Exception as error:
            if rows == 0 or isinstance(error, UserError):
                raise
            # There is no C compiler, or the model cannot be compiled.
            print(f"warning: answers are not compiled: {first_line(error)}", file=sys.stderr)
            torch.compiler.set_stance("force_eager")  # until the state is put back
            rows = 0
            said = complete(here, rows)
        answers |= dict(zip(some, said, strict=True))
    return [answers[n] for n in range(len(texts))]


def is_compiled_for(model: PreTrainedModel, steps: int) -> bool:
    """Whether so many decoding steps earn back what transformers takes to compile one.

    Measured on an H200 with a model of 1 billion parameters: 16 s once, then a quarter of the time.
    """
    on_gpu = model.device.type == "cuda" and position_limit(model) is None
    quantizer = getattr(model, "hf_quantizer", None)
    compilable = quantizer is None or quantizer.is_compileable
    return on_gpu and compilable and not model.training and steps >= LONG_JOB


def _complete(
    model: PreTrainedModel, tokenizer: Tokenizer, raw: bool, max_length: int,
    streamer: BaseStreamer | None, texts: list[str], rows: int,
) -> list[str]:  # fmt: skip
    """Answer a batch; with `rows`, as a batch of so many, in one of few shapes for the compiler."""
    opened = [(text, "") if raw else _without_blank(text, tokenizer) for text in texts]
    filled = [text for text, _ in opened] + [opened[-1][0]] * (rows - len(opened))
    inputs = _encode(filled, tokenizer, raw, few_lengths=rows > 0).to(model.device)
    asked, limit = inputs["input_ids"].shape[1], position_limit(model)
    if limit is not None and asked >= limit:
        raise UserError(f"a prompt of {asked} tokens fills the model's {limit} positions")
    new = cast(Any, model).generate(
        **inputs, use_cache=True, streamer=streamer, pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=min(max_length, limit - asked) if limit else max_length,
        cache_implementation="static" if rows else None,
    )[: len(texts), asked:]  # fmt: skip
    stops: Any = model.generation_config.eos_token_id
    answers = []
    for ids, (_, blank) in zip(new.tolist(), opened, strict=True):
        end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
        # With special tokens: those that an answer was trained to have belong to it.
        answers.append(str(tokenizer.decode(ids[:end])).removeprefix(blank))
    return answers


def _without_blank(prompt: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """A prompt without a blank at its end that merges with the first word in training's tokens."""
    bare = prompt.rstrip(" ")
    if bare == prompt:
        return prompt, ""
    apart, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{prompt}a")
    )
    return (prompt, "") if whole[: len(apart)] == apart else (bare, prompt[len(bare) :])


def _encode(
    texts: list[str], tokenizer: Tokenizer, raw: bool, few_lengths: bool = False
) -> BatchEncoding:
    # On the left: the answer continues the prompt, not its padding. Right padding gives other
    # completions, silently.
    # Raw text wants the tokenizer's BOS; a rendered template has written its own already.
    options: Any = {"add_special_tokens": raw, "return_token_type_ids": False}
    options |= {"padding": len(texts) > 1, "padding_side": "left", "return_tensors": "pt"}
    inputs = tokenizer(texts, **options)
    if few_lengths:  # powers of two
        length = max(128, 2 ** (inputs["input_ids"].shape[1] - 1).bit_length())
        inputs = tokenizer(texts, **(options | {"padding": "max_length", "max_length": length}))
    return inputs


def _as_text(prompt: Prompt, tokenizer: Tokenizer, raw: bool, tools: list[dict] | None) -> str:
    if isinstance(prompt, str):
        if raw:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, dict):
        prompt, tools = prompt["messages"], prompt.get("tools") or tools
    try:
        return chat_text(tokenizer, prompt, True, tools)
    except ValueError as error:
        raise UserError(f"{str(prompt)[:80]}: {error}") from None


@contextmanager
def _inference_state(
    model: PreTrainedModel, own: GenerationConfig, dtype: torch.dtype | None, compiling: bool
) -> Generator[None]:
    """Evaluation mode, and all that a forward pass outside of training needs; put back."""
    training, attention = model.training, model.config._attn_implementation
    kept = model.generation_config  # whose values transformers takes for all that is not given
    model.eval()
    model.generation_config = own
    if attention == "varlen":  # reads packed rows only, without a cache
        model.set_attn_implementation("sdpa")
    try:
        with (
            torch.inference_mode(not training),
            without_input_casts(model),
            autocast(model.device, dtype or base_dtype(model)),
            # Else eagerly: each length would be a new shape for a compiled layer.
            torch.compiler.set_stance("default" if compiling else "force_eager"),
        ):
            yield
    finally:
        model.generation_config = kept
        if hasattr(model, "peft_config"):  # to which PEFT has handed it on
            cast(Any, model).get_base_model().generation_config = kept
        if attention == "varlen":
            model.set_attn_implementation(attention)
        model.train(training)
