"""Check files, folders and first rows of a run before anything heavy is imported."""

import json
from collections.abc import Iterator
from pathlib import Path

from src.config import Config, ModelConfig, load_config
from src.data.rows import check_source
from src.data.sources import expand
from src.utils.environment import from_root, hf_home
from src.utils.errors import UserError
from src.utils.files import ADAPTER, RECIPE, RECORD, write_problem

TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}
TRACES = ("metrics.jsonl", "checkpoints", "final")  # that a run leaves in its folder


def check_run(config: Config, output: bool = True) -> None:
    """Check the model's folder, the first rows of local data, and the output folder.

    Args:
        config: of the run.
        output: whether a run will write into the output folder.

    Raises:
        UserError: with all problems that were found.
    """
    problems = list(_model_problems(config.model))
    if config.lora and config.lora.adapter:
        problems += _adapter_problems(config.lora.adapter)
    checked = set()
    for key, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        try:
            for source in expand(sources) if isinstance(sources, str | list) else ():
                if source not in checked:
                    checked.add(source)
                    check_source(key, source, config.data)
        except UserError as error:
            problems += error.problems
    problems += _output_problems(config) if output else ()
    if problems:
        raise UserError(*problems)


def find_trained(name: str, base: str | None = None) -> str:
    """The folder or hub id that a script's MODEL means, checked before anything is loaded.

    Args:
        name: a run's folder, its `final/`, a checkpoint, any saved model, a hub id, or an MLflow
            URI (`models:/...`, `runs:/...`), whose files are fetched.
        base: the adapter's base model, if it has moved.

    Raises:
        UserError: it is no saved model, or lacks its tokenizer or its base.
    """
    if name.startswith(("models:/", "runs:/")):
        name = _from_mlflow(name)
    folder = from_root(name)
    if not folder.is_dir():
        if _is_local(name):
            raise UserError(f"{name}: no such folder; training prints where its model is")
        return name
    files = {path.name for path in folder.iterdir()}
    if not files & {"config.json", ADAPTER, "run.json"} and (folder / "final").is_dir():
        folder = folder / "final"
        files = {path.name for path in folder.iterdir()}
    if "run.json" in files:  # a checkpoint
        return str(folder)
    if not files & {"config.json", ADAPTER}:
        raise UserError(f"{folder}: no config.json or {ADAPTER}: not a saved model")
    if not files & TOKENIZER_FILES:
        raise UserError(f"{folder}: no tokenizer in it; save one with tokenizer.save_pretrained")
    if ADAPTER in files:
        described = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        origin = Path(base or described.get("base_model_name_or_path", ""))
        if origin.is_absolute() and not origin.is_dir():
            gone = f"its base model was at {origin}, and is not now; give --base"
            raise UserError(f"{folder}: {gone}")
    return str(folder)


def trained_config(folder: str) -> Config | None:
    """Read the config that a saved model was trained with; None if it is not the result of a run.

    Args:
        folder: what `find_trained` returned.
    """
    path = Path(folder) / RECIPE
    return load_config(path)[0] if path.is_file() else None


def find_runs(names: list[str]) -> list[Path]:
    """Return the output folders of runs.

    Raises:
        UserError: a folder holds no run.
    """
    folders = [from_root(name) for name in names]
    if unknown := [folder for folder in folders if not (folder / RECORD).is_file()]:
        raise UserError(*(f"{folder}: no {RECORD} in it: not a run's folder" for folder in unknown))
    return folders


def _from_mlflow(uri: str) -> str:
    import mlflow

    from src.training.tracking import connect, tracking_uri

    connect()
    mlflow.set_tracking_uri(tracking_uri())
    try:
        return mlflow.artifacts.download_artifacts(uri)
    except Exception as error:  # noqa: BLE001 - whatever its store raises
        raise UserError(f"{uri}: {str(error).splitlines()[0]}") from None


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if model.chat_template and not from_root(model.chat_template).is_file():
        yield f"model.chat_template: {model.chat_template}: no such file"
    folder, name = from_root(model.name), f"model.name: {model.name}"
    if not folder.is_dir():
        if _is_local(model.name):
            yield f"{name}: no such folder, and not a hub id (org/name)"
        elif model.init == "random":
            yield f"model.init: random needs a local folder with a config.json, not {model.name}"
        return
    if (folder / ADAPTER).is_file():
        yield f"{name}: an adapter; name its base model here, and the adapter as lora.adapter"
        return
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield f"{name}: no config.json in this folder"
        return
    except ValueError as error:
        yield f"{name}/config.json: not valid JSON ({error})"
        return
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        yield f"{name}: no tokenizer in this folder; save it there with tokenizer.save_pretrained"
    if model.init == "pretrained" and not any(folder.glob("*.safetensors")):
        yield (
            f"{name}: no safetensors weights in this folder; model.init=random builds fresh ones "
            "(pickled ones can run code when they are read: convert them)"
        )
    method = described.get("quantization_config", {}).get("quant_method")
    if model.quantization != "none" and method not in {None, "bitsandbytes"}:
        yield (
            f"model.quantization: {model.name} is quantized already ({method}) and cannot be "
            f"quantized to {model.quantization}; use model.quantization=none or the original"
        )


def _adapter_problems(name: str) -> Iterator[str]:
    folder, key = from_root(name), f"lora.adapter: {name}"
    if not folder.is_dir():
        if _is_local(name):
            yield f"{key}: no such folder, and not a hub id (org/name)"
    elif not (folder / ADAPTER).is_file():
        hint = f"; did you mean {name}/final?" if (folder / "final" / ADAPTER).is_file() else ""
        yield f"{key}: no {ADAPTER} in this folder: not a saved adapter{hint}"


def _is_local(name: str) -> bool:
    """Whether a name cannot be a hub id."""
    return name.startswith((".", "/", "~", "configs/", "outputs/")) or name.count("/") > 1


def _output_problems(config: Config) -> Iterator[str]:
    output, resume = from_root(config.output_dir), config.training.resume
    if problem := write_problem(hf_home()):
        yield f"HF_HOME: {problem}"
    # A file beside the output folder locks it.
    if problem := write_problem(output) or write_problem(output.parent):
        yield f"output_dir: {problem}"
    elif resume == "never" and any((output / name).exists() for name in TRACES):
        yield (
            f"output_dir: {config.output_dir} holds a run already, and nothing is overwritten; "
            "training.resume=auto continues it, another output_dir=… starts anew"
        )
    elif resume not in {"never", "auto"} and not Path(from_root(resume), "manifest.json").is_file():
        yield f"training.resume: {resume}: not a checkpoint (never, auto, or a checkpoint's folder)"
