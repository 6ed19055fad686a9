"""Makes what both sides train on, from a seed and without a download: rows, tokenizer, model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
WORDS = 30_000
TOKENIZER_SIZE = 16_384
# The rendered project's template, without tools. TRL needs the markers around what carries loss.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '### ' + message['role'] | capitalize + ':\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] -}}
    {%- endif -%}
    {{- '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\n' -}}{%- endif -%}
"""
# Words of a row, log-normal: with the template's markers a chat is about 80 tokens, most of them
# between 30 and 160, 60 % of them the prompt. A document is longer than any max_length here.
KINDS = {"chats": (4.05, 0.5, 8, 380), "documents": (9.0, 0.1, 6000, 12000)}


def dictionary(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Made-up words of one to four syllables, and how often each occurs (Zipf's law)."""
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "ou", "an")]
    words: dict[str, None] = {}
    while len(words) < WORDS:
        words["".join(rng.choice(syllables, rng.integers(1, 5)))] = None
    weight = 1 / np.arange(3, WORDS + 3)
    return np.array(sorted(words, key=len)), weight / weight.sum()


def texts(kind: str, count: int) -> Iterator[tuple[str, str]]:
    """Prompt and answer of each row."""
    rng = np.random.default_rng(SEED)
    words, frequency = dictionary(rng)
    mean, spread, low, high = KINDS[kind]
    for start in range(0, count, 1000):  # a million rows' words at once would be gigabytes
        number = min(1000, count - start)
        lengths = rng.lognormal(mean, spread, number).astype(int).clip(low, high)
        drawn = iter(np.split(rng.choice(words, lengths.sum(), p=frequency), lengths.cumsum()[:-1]))
        for text in drawn:
            cut = round(0.52 * len(text))  # the markers make it 60 % of the tokens
            yield " ".join(text[:cut]), " ".join(text[cut:])


def write_rows(path: Path, kind: str, count: int) -> None:
    """Chats as `messages`, of which the answer is labelled; documents as `text`, all labelled."""
    with path.open("w") as file:
        for prompt, answer in texts(kind, count):
            chat = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            row = {"messages": chat} if kind == "chats" else {"text": f"{prompt} {answer}"}
            file.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 16,384 tokens, with `CHAT_TEMPLATE`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=["<|begin|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (f"### User:\n{a}\n\n### Assistant:\n{b}" for a, b in texts("chats", 20_000))
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_model(folder: Path, shape: dict[str, Any], device: str) -> None:
    """A Llama of this shape with random bf16 weights, made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


def measure_matmul() -> float:
    """TFLOP/s of the best of several large bf16 matrix products on the GPU, now."""
    import torch

    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 10e3)
    return 2 * size**3 / best / 1e12


def walk_batches(rows: Path, model: Path) -> None:
    """Prepare rows as scripts/train.py does, and walk one epoch; print the clock at both ends."""
    from src.config import Config
    from src.data.batching import TokenLoader
    from src.data.dataset import load_tokens
    from src.models.model import load_tokenizer

    config = Config.model_validate(
        {
            "seed": SEED,
            "output_dir": "unused",
            "model": {"name": str(model)},
            "data": {"train": str(rows), "max_length": 512},
        }
    )
    tokenizer = load_tokenizer(config.model)
    data = load_tokens(str(rows), tokenizer, config.data)
    loader = TokenLoader(
        data, config, tokenizer.pad_token_id, packing=True, shuffle=True, pin_memory=False
    )
    batches = iter(loader)
    tokens = next(batches)["tokens"]
    print(time.perf_counter(), flush=True)
    tokens += sum(batch["tokens"] for batch in batches)
    print(time.perf_counter(), flush=True)
    assert tokens == data.lengths.sum(), "an epoch sees every token once"


def main(command: str, *arguments: str) -> None:
    """Do one thing, in a process of its own: compare.py itself stays small."""
    if command == "rows":
        path, kind, count = arguments
        write_rows(Path(path), kind, int(count))
    elif command == "tokenizer":
        write_tokenizer(Path(*arguments))
    elif command == "model":
        folder, shape, device = arguments
        write_model(Path(folder), json.loads(shape), device)
    elif command == "matmul":
        print(measure_matmul())
    elif command == "batches":
        walk_batches(*map(Path, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
