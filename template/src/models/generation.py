"""Answers from a model, under inference_mode: one prompt, a batch of them, or a stream."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from itertools import batched
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import BaseStreamer

from src.data.chat import chat_text
from src.models.adapters import base_dtype, base_of, stop_input_casts
from src.models.model import position_limit, stops_of
from src.utils.device import autocast
from src.utils.errors import UserError, first_line

LONG_JOB = 2000  # decoding steps: 20 s for a model of 1 billion parameters on an H200

Prompt = str | dict[str, Any]  # a question, or a row as `read_question` returns it


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: Prompt | list[Prompt],
    max_length: int = 256, *, temperature: float = 0.0, top_p: float = 1.0, batch_size: int = 16,
    streamer: BaseStreamer | None = None, dtype: torch.dtype | None = None,
) -> str | list[str]:  # fmt: skip
    """Complete one prompt, or many in batches of similar length.

    The model's own generation config (repetition_penalty, top_k, …) is not used. Runs in
    `inference_mode`, except for a model in training mode: tensors that a model caches in
    `inference_mode` cannot take part in a later backward pass.

    Args:
        model: a causal language model, in any mode; its mode and attention are restored.
        tokenizer: the one it was trained with.
        prompt: a user's question, or a row with `messages` and `tools`, or with `text` to be
            continued as it is, without the chat template; its `place` names it in errors. Or a
            list of them.
        max_length: of *new* tokens, unlike transformers' own `max_length`. A model with a table
            of positions (GPT-2) also stops at its end.
        temperature: 0 takes the likeliest token each time; above 0, tokens are sampled.
        top_p: sample from the likeliest tokens that add up to this probability.
        batch_size: prompts at a time.
        streamer: receives tokens as they come (one prompt only), e.g. a `TextStreamer`.
        dtype: of matmuls, by autocast, as in training; None: the dtype of the base's weights.

    Returns:
        The text after the prompt, up to the stop token, otherwise unchanged; a list for a list.

    Raises:
        UserError: a prompt leaves no position for an answer, or the template refuses it.
    """
    given: Any = prompt if isinstance(prompt, list) else [prompt]
    model = base_of(model)  # PEFT's own `generate` would leave our config in it
    limit = position_limit(model.config)
    prompts = [_encode(each, tokenizer, limit) for each in given]
    stops, pad = stops_of(model, tokenizer), tokenizer.pad_token_id or 0
    config = GenerationConfig(eos_token_id=stops, pad_token_id=pad)
    if temperature > 0:  # top_k=0: else transformers draws from the 50 likeliest only
        config.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    compiled = is_compiled_for(model, -(-len(prompts) // batch_size) * max_length)
    with _inference_state(model, config, dtype, compiled):
        complete = partial(_complete, model, max_length, limit, streamer)
        answers = _in_batches(complete, [ids for ids, _ in prompts], batch_size, compiled)
    # With special tokens: those that an answer was trained to have belong to it.
    texts = [str(tokenizer.decode(ids)) for ids in answers]
    texts = [text.removeprefix(blank) for text, (_, blank) in zip(texts, prompts, strict=True)]
    return texts if isinstance(prompt, list) else texts[0]


def _in_batches(
    complete: Callable[..., list[list[int]]], prompts: list[list[int]], size: int, compiled: bool
) -> list[list[int]]:
    """Answer prompts of similar length together, the longest first: it needs the most memory."""
    answers: dict[int, list[int]] = {}
    for numbers in batched(sorted(range(len(prompts)), key=lambda n: -len(prompts[n])), size):
        batch = [prompts[n] for n in numbers]
        try:
            said = complete(batch, size if compiled else 0)
        except Exception as error:
            if not compiled:
                raise
            # There is no C compiler, or the model cannot be compiled.
            print(f"warning: answers are not compiled: {first_line(error)}", file=sys.stderr)
            torch.compiler.set_stance("force_eager")  # until the state is restored
            compiled, said = False, complete(batch, 0)
        answers |= zip(numbers, said, strict=False)  # filled up for the compiler
    return [answers[n] for n in range(len(prompts))]


def is_compiled_for(model: PreTrainedModel, steps: int) -> bool:
    """Whether so many decoding steps earn back what transformers takes to compile one.

    Measured on an H200 with a model of 1 billion parameters: 16 s once, then a quarter of the time.
    """
    on_gpu = model.device.type == "cuda" and position_limit(model.config) is None
    quantizer = getattr(model, "hf_quantizer", None)
    compilable = quantizer is None or quantizer.is_compileable
    return on_gpu and compilable and not model.training and steps >= LONG_JOB


def _complete(
    model: PreTrainedModel, max_length: int, limit: int | None, streamer: BaseStreamer | None,
    batch: list[list[int]], rows: int,
) -> list[list[int]]:  # fmt: skip
    """Return the tokens after each prompt up to the stop token; the first prompt is the longest.

    `rows` is not 0 for the compiler: then a batch has so many, and one of few lengths.
    """
    width = len(batch[0])
    if rows:
        batch = batch + batch[-1:] * (rows - len(batch))
        width = max(128, 2 ** (width - 1).bit_length())
    config: Any = model.generation_config
    # On the left: the answer continues the prompt, not its padding. Right padding gives other
    # completions, silently.
    ids = torch.tensor([[config.pad_token_id] * (width - len(each)) + each for each in batch])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in batch])
    output = cast(Any, model).generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), streamer=streamer,
        max_new_tokens=min(max_length, limit - width) if limit else max_length,
        use_cache=True, cache_implementation="static" if rows else None,
    )  # fmt: skip
    stops = config.eos_token_id
    return [
        answer[: next((at for at, token in enumerate(answer) if token in stops), None)]
        for answer in output[:, width:].tolist()
    ]


def _encode(prompt: Prompt, tokenizer: Tokenizer, limit: int | None) -> tuple[list[int], str]:
    """Return a prompt's tokens, and the blanks at its end that are left out of them.

    They are if training's tokens merge such a blank with the answer's first word.
    """
    row: Any = prompt
    if isinstance(prompt, str):
        row = {"messages": [{"role": "user", "content": prompt}]}
    encode, blank = partial(tokenizer, add_special_tokens=False), ""
    try:
        if "text" in row:
            ids: Any = tokenizer(row["text"])["input_ids"]  # with the tokenizer's BOS
        else:  # a rendered template has its BOS already
            text = chat_text(tokenizer, row["messages"], True, row.get("tools"))
            ids, bare = encode(text)["input_ids"], text.rstrip(" ")
            if bare != text and encode(f"{text}a")["input_ids"][: len(ids)] != ids:
                ids, blank = encode(bare)["input_ids"], text[len(bare) :]
        if limit is not None and len(ids) >= limit:
            raise ValueError(f"a prompt of {len(ids)} tokens fills the model's {limit} positions")
    except ValueError as error:
        raise UserError(f"{row.get('place', str(prompt)[:80])}: {error}") from None
    return ids, blank


@contextmanager
def _inference_state(
    model: PreTrainedModel, own: GenerationConfig, dtype: torch.dtype | None, compiling: bool
) -> Generator[None]:
    """Evaluation mode, and all that a forward pass outside of training needs; then restored."""
    training, attention = model.training, model.config._attn_implementation
    kept = model.generation_config  # its values replace those that a call leaves out
    model.eval()
    model.generation_config = own
    stop_input_casts(model)
    if attention == "varlen":  # reads packed rows only, without a cache
        model.set_attn_implementation("sdpa")
    try:
        with (
            torch.inference_mode(not training),
            autocast(model.device, dtype or base_dtype(model)),
            # Else eager: each length would be a new shape for a compiled layer.
            torch.compiler.set_stance("default" if compiling else "force_eager"),
        ):
            yield
    finally:
        model.generation_config = kept
        if attention == "varlen":
            model.set_attn_implementation(attention)
        model.train(training)
