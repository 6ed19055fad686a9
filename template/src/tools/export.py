"""Write one ordinary model folder from a trained model: adapters merged, with a model card."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
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
from src.training.metrics import read_metrics
from src.training.record import Record
from src.training.trainer import evaluate
from src.utils.environment import from_root
from src.utils.errors import RunError, UserError
from src.utils.files import ADAPTER, RECIPE
from src.utils.memory import GIB

CPU = torch.device("cpu")
# How much merging may change the logits, relative to their norm: a bf16 weight keeps 8 bits of
# the sum, and the rounding errors of layers add up.
MAX_CHANGE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
COMPARED_ROWS = 8
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank accepts


def export(folder: Path, out: Path, base: str | None, config: Config) -> str:
    """Write a full model to `out`: safetensors shards, tokenizer, chat template and stop tokens.

    It first prints how much memory and disk that takes.

    Args:
        folder: a run's `final/`.
        out: an empty folder.
        base: the adapter's base model, if it has moved.
        config: that the run was trained with.

    Returns:
        What merging changed, for the terminal and the card.

    Raises:
        UserError: the base is quantized: merging would round the adapter away.
        RunError: merging changed the model by more than rounding does.
    """
    adapter, source, trust = folder / ADAPTER, str(folder), config.model.trust_remote_code
    if adapter.is_file():
        source = base or json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]
    size = sum(file.stat().st_size for file in from_root(source).glob("*.safetensors")) / GIB
    needs = (
        f"{1.3 * size:.2f} GiB of memory and {size:.2f} of disk" if size else "as much as its base"
    )
    print(f"exporting  {folder}, weights of {source}; needs {needs}")
    logging.disable_progress_bar()
    with explained(source):
        hf_config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    if getattr(hf_config, "quantization_config", None):
        problem = "is quantized, and merging would round the adapter away"
        raise UserError(f"{source}: {problem}; name the original with --base")
    dtype = hf_config.dtype or torch.float32
    settings = ModelConfig(name=source, trust_remote_code=trust)
    tokenizer = load_tokenizer(ModelConfig(name=str(folder), trust_remote_code=trust))
    if adapter.is_file():
        model, result = _merge_checked(folder, base, settings, dtype, config, tokenizer)
    else:
        model = read_weights(settings, CPU, dtype)
        result = "all weights were trained: there is nothing to merge"
    set_generation_config(model, tokenizer)
    save_model(model, tokenizer, out, dtype)
    return result


def _merge_checked(
    folder: Path, base: str | None, settings: ModelConfig, dtype: torch.dtype, config: Config,
    tokenizer: Tokenizer,
) -> tuple[PreTrainedModel, str]:  # fmt: skip
    """Merge the adapter in full precision, and compare the logits of the run's own rows."""
    data = config.data
    rows = data.eval if isinstance(data.eval, str | list) else data.train
    batches = list(padded_loader(rows, tokenizer, config, limit=COMPARED_ROWS))
    trained_on = ""
    if (kind := config.model.quantization) != "none":  # the adapter learnt to make up for it
        _, loss = _measure(load_trained(folder, CPU, base)[0], batches)
        trained_on = f", and was {loss:.4f} on the {kind} base it was trained on"
    adapted = load_adapters(read_weights(settings, CPU, dtype), folder).eval()
    logits, loss = _measure(adapted, batches)
    model = _merge(adapted)
    merged_logits, merged_loss = _measure(model, batches)
    change = float((merged_logits - logits).norm() / logits.norm())
    changes = f"the logits by {change:.1e} and the loss by {merged_loss - loss:+.1e}"
    result = f"merging changed {changes}; the loss is now {merged_loss:.4f}{trained_on}"
    if not change <= MAX_CHANGE[dtype]:  # NaN too
        limit = f"more than rounding ({MAX_CHANGE[dtype]:g})"
        raise RunError(f"{result}: {limit}; nothing is written")
    return model, result


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
    return logits, evaluate(model, batches, model.device, model.dtype).loss


def write_card(folder: Path, out: Path, name: str, result: str) -> None:
    """Write README.md of the exported model: base, data, figures and versions."""
    run = folder.parent
    recipe = yaml.safe_load((folder / RECIPE).read_text("utf-8"))  # as written, without secrets
    base = recipe["model"]["name"]
    if Path(base).is_absolute():  # no path of this machine
        base = Path(base).name
    record, lines = Record.find(run), read_metrics(run / "metrics.jsonl")
    facts = record.facts if record else {"tags": {}}
    fingerprint = facts["tags"].get("fingerprint.train", "unknown")
    # The step that final/ holds: the best evaluation may have been before the last step.
    step = facts.get("final_step")
    line = next((line for line in lines if line["step"] == step), lines[-1] if lines else {})
    figures = {key: line[key] for key in ("step", "loss", "eval_loss", "tokens") if key in line}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    card = [
        "---", f"base_model: {base}", "library_name: transformers",
        "pipeline_tag: text-generation", "---", "", f"# {name}", "",
        f"Fine-tuned from `{base}`, whose licence applies to it too.", "",
        f"- Data: {recipe['data']['train']} (fingerprint {fingerprint})",
        *(f"- {key}: {'not finite' if x is None else f'{x:g}'}" for key, x in figures.items()),
        f"- {result}",
        f"- Made with {versions}",
    ]  # fmt: skip
    if (curve := run / "loss.png").is_file():
        shutil.copy(curve, out / "loss.png")
        card += ["", "![loss](loss.png)"]
    (out / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")


def serving_advice(folder: Path, out: Path) -> list[str]:
    """Return the commands that serve the export and, where vLLM can, the adapter alone."""
    lines = [f"vllm serve {out}", f"transformers serve {out}"]
    if not (folder / ADAPTER).is_file():
        return lines
    adapter = json.loads((folder / ADAPTER).read_text("utf-8"))
    if refused := [key for key in ("use_dora", "modules_to_save") if adapter.get(key)]:
        return [*lines, f"(vLLM does not serve an adapter alone with {' or '.join(refused)})"]
    rank = next(rank for rank in VLLM_RANKS if rank >= adapter["r"])
    base = adapter["base_model_name_or_path"]
    return [
        *lines,
        # The adapter's generation config: the base's own stop tokens do not end a turn.
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={folder} "
        f"--generation-config {folder}",
    ]
