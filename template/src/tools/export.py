"""Write one ordinary model folder from a trained model: adapters merged, with a model card."""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from src.config import Config, ModelConfig
from src.data.batching import TokenLoader, short_row
from src.data.dataset import load_tokens
from src.models.adapters import load_adapters
from src.models.model import load_tokenizer, read_config, read_weights, save_model
from src.preflight import read_json
from src.trained import Trained, load_trained
from src.training.record import read_metrics
from src.training.trainer import evaluate
from src.utils.errors import RunError, UserError
from src.utils.files import METRICS, RECIPE, RECORD

CPU = torch.device("cpu")
# How much merging may change the logits, relative to their norm: a bf16 weight keeps 8 bits of
# the sum, and the rounding errors of layers add up.
MAX_CHANGE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
COMPARED_ROWS = 8
CARD = """\
---
{metadata}
---
# {title}
{origin}
```python
from transformers import pipeline
answer = pipeline("text-generation", "{name}")
messages = [dict(role="user", content="your question")]
print(answer(messages, max_new_tokens=256, do_sample=False)[0]["generated_text"][-1]["content"])
```
- data: {data}
- {result}
"""
FIGURES = ("fingerprint.train", "step", "loss", "eval_loss", "tokens", "torch", "transformers")


def export(found: Trained, out: Path) -> str:
    """Write a full model to `out`: safetensors shards, tokenizer, chat template and stop tokens.

    An adapter is merged in full precision. The logits of the run's own rows are compared.

    Args:
        found: the result of a run.
        out: an empty folder.

    Returns:
        What merging changed, for the terminal and the card.

    Raises:
        UserError: the base is quantized: merging would round the adapter away.
        RunError: merging changed the model by more than rounding does.
    """
    if found.kind == "model":
        no_recipe = shutil.ignore_patterns(RECIPE, "evaluation*")  # which may hold private rows
        shutil.copytree(found.name, out, ignore=no_recipe, dirs_exist_ok=True)
        return "all weights were trained: there is nothing to merge"
    own = found.config.model
    settings = ModelConfig(name=found.base, trust_remote_code=own.trust_remote_code)
    described = read_config(settings)
    if getattr(described, "quantization_config", None):
        problem = "is quantized, and merging would round the adapter away"
        raise UserError(f"{found.base}: {problem}; name the original with --base")
    dtype, trained_on = described.dtype or torch.float32, ""
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(settings.model_copy(update={"name": found.name}))
    batches, rows = _batches(tokenizer, found.config)
    if own.quantization != "none":  # the adapter learnt to make up for it
        _, loss = _measure(load_trained(found, CPU)[0], batches)
        trained_on = f", and was {loss:.4f} on the {own.quantization} base it was trained on"
    adapted = load_adapters(read_weights(settings, CPU, dtype), found.name).eval()
    logits, loss = _measure(adapted, batches)
    model = _merge(adapted)
    merged_logits, merged_loss = _measure(model, batches)
    change = float((merged_logits - logits).norm() / logits.norm())
    changes = f"the logits by {change:.1e} and the loss by {merged_loss - loss:+.1e}{rows}"
    result = f"merging changed {changes}; the loss is now {merged_loss:.4f}{trained_on}"
    if not change <= MAX_CHANGE[dtype]:  # NaN too
        limit = f"more than rounding ({MAX_CHANGE[dtype]:g})"
        raise RunError(f"{result}: {limit}; nothing is written")
    save_model(model, tokenizer, out, dtype)
    return result


def _batches(tokenizer: Tokenizer, config: Config) -> tuple[list[dict[str, Any]], str]:
    """Return a few of the run's rows; where they are not here, other tokens, and what says so."""
    data = config.data
    source = data.eval if isinstance(data.eval, str | list) else data.train
    try:
        documents = load_tokens(source, tokenizer, data, limit=COMPARED_ROWS)
        return list(TokenLoader(documents, config, tokenizer.pad_token_id)), ""
    except (OSError, UserError):
        return [short_row(*range(0, 64, 8))], f", on made-up tokens as {source} cannot be read"


def _merge(adapted: PreTrainedModel) -> PreTrainedModel:
    """Add the adapters to the weights in place, one layer at a time."""
    peft_model: Any = adapted
    base = peft_model.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    inner, outer = (getattr(layer, "base_layer", layer) for layer in (head, embeddings))
    if (inner is not head or outer is not embeddings) and inner.weight is outer.weight:
        # Only one of two tied layers has an adapter: merging into their shared weight would
        # change the other one too.
        inner.weight = nn.Parameter(inner.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return peft_model.merge_and_unload(safe_merge=True).eval()


@torch.no_grad()
def _measure(model: PreTrainedModel, batches: list[dict[str, Any]]) -> tuple[Tensor, float]:
    """Return the first batch's logits, shape (rows, tokens, vocabulary), and the loss of all."""
    logits = model(batches[0]["input_ids"], use_cache=False).logits.float()
    return logits, evaluate(model, batches, model.device, model.dtype)


def write_card(found: Trained, out: Path, name: str, result: str) -> None:
    """Write README.md of the exported model: base, how to ask it, data and figures.

    Args:
        found: the result of a run.
        out: the exported model's folder.
        name: what loads it: its later folder, or its repository on the hub.
        result: what `export` returned.
    """
    folder = Path(found.name)
    recipe = found.config.written  # so without secrets
    base, sources = _public(recipe["model"]["name"]), recipe["data"]["train"]
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    origin = f"Trained from random weights; its architecture is `{base}`'s."
    if recipe["model"]["init"] != "random":
        metadata.base_model = base
        origin = f"Fine-tuned from `{base}`; the base model's license applies to it too."
    data = ", ".join(map(_public, [sources] if isinstance(sources, str) else sources))
    title, name = Path(name).name, _public(name)
    text = CARD.format(
        metadata=metadata, title=title, origin=origin, name=name, data=data, result=result
    )
    facts = read_json(folder.with_name(RECORD))
    # The step that final/ holds: the best evaluation may have been before the last step.
    lines = {line["step"]: line for line in read_metrics(folder.with_name(METRICS))}
    figures = facts.get("tags", {}) | lines.get(facts.get("final_step"), {})
    text += "".join(f"- {key}: {figures[key]}\n" for key in FIGURES if key in figures)
    if (curve := folder.with_name("loss.png")).is_file():
        shutil.copy(curve, out / "loss.png")
        text += "\n![loss](loss.png)\n"
    (out / "README.md").write_text(text, encoding="utf-8")


def _public(name: str) -> str:
    """A name without the folders of this machine."""
    return Path(name).name if Path(name).is_absolute() else name
