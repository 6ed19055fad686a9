"""Everything that can be found wrong before anything heavy is imported, all in one go."""

from __future__ import annotations

import json
from pathlib import Path

from src.config import Config
from src.data.cache import was_tokenised
from src.data.rows import check_source
from src.utils.environment import from_root
from src.utils.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check_run(config: Config) -> None:
    """Check the model's folder, every row of local data, and the output folder.

    Raises:
        UserError: with all problems that were found.
    """
    problems: list[str] = []
    problems += _model_problems(config)
    sources = {"data.train": config.data.train, "data.eval": config.data.eval}
    for key, source in sources.items():
        if source is None or source in list(sources.values())[: list(sources).index(key)]:
            continue  # the same file twice: once is enough
        try:
            # Reading a million rows takes half a minute, knowing the file again a second.
            if not was_tokenised(source):
                check_source(key, source)
        except UserError as error:
            problems += error.problems
    problems += _output_problems(config)
    if problems:
        raise UserError(*problems)


def _model_problems(config: Config) -> list[str]:
    model = config.model
    problems = []
    if model.chat_template and not from_root(model.chat_template).is_file():
        problems.append(f"model.chat_template: {model.chat_template}: no such file")
    folder = from_root(model.name)
    if not folder.is_dir():
        looks_local = model.name.startswith((".", "/", "~")) or model.name.count("/") > 1
        if looks_local or model.name.split("/")[0] in {"configs", "outputs"}:
            problems.append(
                f"model.name: {model.name}: no such folder, and not a hub id (org/name)"
            )
        elif model.init == "random":
            problems.append(
                f"model.init: random needs a local folder with a config.json, not {model.name}"
            )
        return problems
    if (folder / "adapter_config.json").is_file():
        return [*problems, f"model.name: {model.name}: an adapter; name the base model instead"]
    if not (folder / "config.json").is_file():
        return [*problems, f"model.name: {model.name}: no config.json in this folder"]
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        problems.append(
            f"model.name: {model.name}: no tokenizer in this folder (tokenizer.json); save it "
            "there with tokenizer.save_pretrained"
        )
    if model.init == "pretrained" and not any(folder.glob("*.safetensors")):
        pickled = (
            ", only pickled ones, which can run code: convert them"
            if any(folder.glob("*.bin"))
            else ""
        )
        problems.append(
            f"model.name: {model.name}: no safetensors weights in this folder{pickled}; "
            "model.init=random builds fresh ones"
        )
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return [*problems, f"{model.name}/config.json: not valid JSON ({error})"]
    method = described.get("quantization_config", {}).get("quant_method")
    if model.quantization != "none" and method not in {None, "bitsandbytes"}:
        problems.append(
            f"model.quantization: {model.name} is quantized already ({method}) and cannot be "
            f"quantized to {model.quantization}; use model.quantization=none or the original"
        )
    return problems


def _output_problems(config: Config) -> list[str]:
    output = from_root(config.output_dir)
    resume = config.training.resume
    if output.exists() and not output.is_dir():
        return [f"output_dir: {config.output_dir} is a file"]
    traces = ("metrics.jsonl", "checkpoints", "final")
    if resume == "never" and any((output / name).exists() for name in traces):
        return [
            f"output_dir: {config.output_dir} holds a run already, and nothing is overwritten; "
            "training.resume=auto continues it, another output_dir=… starts anew"
        ]
    if resume not in {"never", "auto"} and not Path(from_root(resume), "manifest.json").is_file():
        return [
            f"training.resume: {resume}: not a checkpoint (never, auto, or a checkpoint's folder)"
        ]
    return []
