"""Make one ordinary model folder of what training left: adapters merged, and a card."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from src.config import Config, ModelConfig
from src.data.batching import padded_loader
from src.models.adapters import load_adapters
from src.models.model import (
    explained,
    load_tokenizer,
    read_weights,
    save_model,
    set_generation_config,
)
from src.trained import load_trained
from src.training.record import Record
from src.training.report import read_metrics
from src.training.trainer import evaluate
from src.utils.environment import from_root
from src.utils.errors import RunError, UserError
from src.utils.files import ADAPTER, RECIPE
from src.utils.memory import GIB

CPU = torch.device("cpu")
# What merging may change: a bf16 weight keeps 8 bits of the sum, and layers add up their roundings.
MOST = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def say_memory(folder: Path, base: str | None) -> str:
    """What an export will need."""
    name = _weights_of(folder, base)
    files = list(from_root(name).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / GIB
    needs = f"about {1.3 * size:.1f} GiB of memory, and {size:.1f} on the disk" if files else "?"
    return f"export     {folder} on {name}: {needs}"


def export(folder: Path, out: Path, base: str | None, config: Config) -> str:
    """Write a full model to `out`; return what merging changed.

    Args:
        folder: a run's `final/`.
        out: an empty folder: safetensors shards, tokenizer with its chat template, stop tokens.
        base: the adapter's base model, if it has moved.
        config: that the run was trained with.

    Raises:
        UserError: the base is quantized: merged into it, an adapter is rounded away.
        RunError: merging changed the model by more than rounding does.
    """
    name, told = _weights_of(folder, base), "all weights were trained: there is nothing to merge"
    logging.disable_progress_bar()
    trust = config.model.trust_remote_code
    with explained(name):
        described = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    if getattr(described, "quantization_config", None):
        why = "is quantized, and an adapter merged into it would be rounded away"
        raise UserError(f"{name}: {why}; name the original with --base")
    dtype = described.dtype or torch.float32
    settings = ModelConfig(name=name, trust_remote_code=trust)
    tokenizer = load_tokenizer(ModelConfig(name=str(folder), trust_remote_code=trust))
    if (folder / ADAPTER).is_file():
        own = isinstance(config.data.eval, str | list)
        rows = config.data.eval if own else config.data.train
        batches = list(padded_loader(rows, tokenizer, config, limit=8))
        told = _as_trained(folder, base, config.model.quantization, batches)
        model = read_weights(settings, CPU, dtype)
        adapted = load_adapters(model, folder).eval()
        logits, loss = _measure(adapted, batches)
        model = _merge(adapted)
        merged, merged_loss = _measure(model, batches)
        change = float((merged - logits).norm() / logits.norm())
        changed = f"the logits by {change:.1e} and the loss by {merged_loss - loss:+.1e}"
        told = f"merging changed {changed}; the loss is now {merged_loss:.4f}{told}"
        if not change <= MOST[dtype]:
            raise RunError(f"{told}: more than rounding ({MOST[dtype]:g}); nothing is written")
    else:
        model = read_weights(settings, CPU, dtype)
    set_generation_config(model, tokenizer)
    save_model(model, tokenizer, out, dtype)
    return told


def _as_trained(folder: Path, base: str | None, kind: str, batches: list[dict[str, Any]]) -> str:
    """The loss on the quantized base, for which an adapter learnt to make up."""
    if kind == "none":
        return ""
    model, _ = load_trained(folder, CPU, base)
    return f", and was {_measure(model, batches)[1]:.4f} on the {kind} base it was trained on"


def _weights_of(folder: Path, base: str | None) -> str:
    adapter = folder / ADAPTER
    if not adapter.is_file():
        return str(folder)
    return base or json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]


def _merge(adapted: PreTrainedModel) -> PreTrainedModel:
    """Add the adapters to the weights in place, one layer at a time."""
    whole: Any = adapted
    base = whole.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    inner, outer = (getattr(layer, "base_layer", layer) for layer in (head, embeddings))
    adapted_one = inner is not head or outer is not embeddings
    if adapted_one and inner.weight is outer.weight:
        # An adapter of one of both: merged into shared weights, it would change the other too.
        inner.weight = nn.Parameter(inner.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return whole.merge_and_unload(safe_merge=True).eval()


@torch.no_grad()
def _measure(model: PreTrainedModel, batches: list[dict[str, Any]]) -> tuple[Tensor, float]:
    """Logits of the first batch, shape (rows, tokens, vocabulary), and the loss of all."""
    logits = model(batches[0]["input_ids"], use_cache=False).logits.float()
    return logits, evaluate(model, batches, model.device, model.dtype).loss


def write_card(folder: Path, out: Path, name: str, told: str) -> None:
    """README.md of the exported model: base, data, figures, versions, and the commands."""
    recipe = yaml.safe_load((folder / RECIPE).read_text("utf-8"))
    record = sorted(folder.parent.glob("checkpoints/step-*/run.json"))
    data = json.loads(record[-1].read_text())["identity"]["data.train"] if record else None
    rows = read_metrics(folder.parent / "metrics.jsonl")
    # Of the step that final/ holds: the best evaluation may have been before the last.
    held = Record.find(folder.parent)
    step = held.facts.get("final_step") if held else None
    row = next((row for row in rows if row["step"] == step), rows[-1] if rows else {})
    last = {k: row[k] for k in ("step", "loss", "tokens") if row.get(k) is not None}
    evaluated = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    figures = {**last, **({"best eval_loss": min(evaluated)} if evaluated else {})}
    base = _public(recipe["model"]["name"])
    lines = [
        "---", f"base_model: {base}", "library_name: transformers",
        "pipeline_tag: text-generation", "---", "", f"# {name}", "",
        f"Fine-tuned from `{base}`, whose licence holds for it too.", "",
        f"- Data: {data or recipe['data']['train']}",
        *(f"- {key}: {value:g}" for key, value in figures.items()),
        f"- {told}",
        "- Made with " + ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "peft")),
        "", "```sh", "uv run scripts/export.py RUN OUT", "```",
    ]  # fmt: skip
    if (curve := folder.parent / "loss.png").is_file():
        shutil.copy(curve, out / "loss.png")
        lines += ["", "![loss](loss.png)"]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _public(name: str) -> str:
    """Without a path of this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def serving_advice(folder: Path, out: Path) -> list[str]:
    """The commands that serve the export and, where vLLM can, the bare adapter."""
    lines = [f"vllm serve {out}", f"transformers serve {out}"]
    adapter = folder / ADAPTER
    if not adapter.is_file():
        return lines
    made = json.loads(adapter.read_text("utf-8"))
    if refused := [key for key in ("use_dora", "modules_to_save") if made.get(key)]:
        return [*lines, f"(vLLM takes no bare adapter with {' or '.join(refused)})"]
    rank = next(r for r in (16, 32, 64, 128, 256, 320, 512) if r >= made["r"])
    base = made["base_model_name_or_path"]
    return [
        *lines,
        # With its generation config: the base's own stops are not the end of a turn.
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={folder} "
        f"--generation-config {folder}",
    ]
