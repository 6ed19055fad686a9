"""The typed schema of a run's configuration; `load_config` finds every problem in one go.

Every default stands here once, with its reason. YAML files under `configs/` say only what
differs, and the command line (`key=value`) says the last word.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from src.utils.errors import UserError

PositiveInt = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
NotEmpty = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A group of keys; wrong types and unknown keys are errors."""

    # strict: `learning_rate: "fast"`, `batch_size: true` and an unquoted YAML `no` for a name
    # are errors, not silent conversions. forbid: a typo never becomes a default.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(Section):
    """Which model, how it is loaded, and how its forward pass runs."""

    # A hub id, or a local folder (relative to the project's root).
    name: NotEmpty
    # random: build the architecture that the local config describes, with fresh weights.
    init: Literal["pretrained", "random"] = "pretrained"
    # 4bit is QLoRA's NF4 with double quantisation: an 8B model's weights in 5.3 GiB, not 15.
    quantization: Literal["4bit", "8bit", "none"] = "none"
    # auto: bf16 on a GPU that has it, fp16 with a loss scaler on one that has not, fp32 on a CPU.
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # auto: `varlen` for packed batches where the model allows it, else `sdpa`. Any other name
    # goes to transformers as it is, e.g. flash_attention_2 or eager.
    attention: NotEmpty = "auto"
    # Recompute activations in the backward pass: about 40 % less memory for 20 % less speed.
    gradient_checkpointing: bool = False
    # 1 recomputes every layer; k only each k-th, for memory that would otherwise go unused.
    every_n_layers: PositiveInt = 1
    # Compile each layer: minutes at the start, then about 15 % faster steps on a GPU.
    compile: bool = False
    # True executes Python code that the model's repository ships, with your rights.
    trust_remote_code: bool = False
    # A Jinja file. null: the tokenizer's own; a model without one gets configs/chat_template.j2.
    chat_template: NotEmpty | None = None


class LoraConfig(Section):
    """Low-rank adapters; `lora: null` trains every weight instead."""

    # 16 is where more rank stops helping on most instruction data (Biderman et al. 2024).
    r: PositiveInt = 16
    # Updates are scaled by alpha / r; 2r is the common choice.
    alpha: PositiveInt = 32
    # Dropout keeps one more copy of each layer's input: about +50 % activation memory.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # all-linear: every linear layer but the head, which beats attention only (QLoRA, 2023).
    target_modules: NotEmpty | Annotated[list[NotEmpty], Field(min_length=1)] = "all-linear"


class DataConfig(Section):
    """Where rows come from and how they become batches."""

    # A .jsonl, .json, .csv or .parquet file (relative to the project's root), or a hub id,
    # optionally with a split: "org/name:train".
    train: NotEmpty
    # The same, or null for no evaluation.
    eval: NotEmpty | None = None
    # Tokens of the longest document; longer ones are cut there, and counted.
    max_length: Annotated[int, Field(ge=8)] = 2048
    # Lay documents end to end in one row of batch_size x max_length tokens: no padding.
    packing: bool = True
    # Processes that build batches ahead. Tokens are memory-mapped; 0 is enough for most.
    num_workers: NotNegativeInt = 0


class TrainingConfig(Section):
    """The optimisation, and what happens how often (all in optimizer steps)."""

    # A microbatch is batch_size x data.max_length tokens.
    batch_size: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 1
    epochs: PositiveInt = 1
    # Stop after so many steps, whatever epochs says; null: no limit.
    max_steps: PositiveInt | None = None
    # LoRA's usual rate, about ten times a full fine-tuning's.
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    # adamw8bit keeps its moments paged and in 8 bits: worth it for full fine-tuning only.
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NotNegativeInt = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # Gradients above this norm are scaled down to it; null: never.
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    # A loss or gradient that is NaN or infinite: stop before the step, or skip it and count.
    on_non_finite: Literal["stop", "skip"] = "stop"
    log_every: PositiveInt = 10
    # null: once, at the end.
    eval_every: PositiveInt | None = None
    # Stop after so many evaluations without a better loss; null: never.
    patience: PositiveInt | None = None
    # null: no checkpoints, only the final model.
    save_every: PositiveInt | None = 100
    # The newest so many stay, and the best one always.
    keep_checkpoints: PositiveInt = 2
    # never | auto: continue the newest whole checkpoint under output_dir, if there is one |
    # the path of a checkpoint.
    resume: NotEmpty = "never"
    # Resume although the model, the data or the batch geometry differ.
    allow_mismatch: bool = False
    # Train and evaluate on the first so many rows: a loss that will not go to zero shows a
    # wrong mask, template or stop token within a minute.
    overfit: PositiveInt | None = None


class TrackingConfig(Section):
    """MLflow; `metrics.jsonl` is written in any case."""

    enabled: bool = True
    experiment: NotEmpty = "default"
    # null: the name of output_dir.
    run_name: NotEmpty | None = None


class Config(Section):
    """One run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    # Same bits on the same machine and versions, at a price in speed.
    deterministic: bool = False
    output_dir: NotEmpty
    device: Literal["auto", "cuda", "cpu"] = "auto"
    model: ModelConfig
    lora: LoraConfig | None = LoraConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _keys_that_exclude_each_other(self) -> Config:
        model, problems = self.model, []
        if model.quantization != "none" and self.lora is None:
            problems.append(
                f"model.quantization: {model.quantization} weights cannot be trained themselves; "
                "use model.quantization=none for full fine-tuning, or set lora"
            )
        if model.quantization != "none" and model.init == "random":
            problems.append(
                f"model.quantization: {model.quantization} needs saved weights to quantize; "
                "use model.init=pretrained, or model.quantization=none"
            )
        if model.init == "random" and self.lora is not None:
            problems.append(
                "lora: an adapter is saved without its base, and nobody could load random weights "
                "again; use model.init=pretrained, or lora=null"
            )
        if self.training.patience and not (self.data.eval or self.training.overfit):
            problems.append("training.patience: needs data.eval to measure progress on")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, dict]:
    """Read a YAML file, apply `key=value` overrides, and validate everything.

    Returns:
        The typed config, and the same as plain data for `config.yaml` and the tracker: resolved,
        but whatever came out of an environment variable stays `${oc.env:NAME}`, so that no
        secret is written down.

    Raises:
        UserError: with one line per problem, each naming file and line, or the command line.
    """
    path = Path(path)
    try:
        # utf-8-sig: editors on Windows leave a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(_missing_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    merged = _merge(path, text, overrides or [])
    where = _Where(path, text, overrides or [])
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UserError(f"{where(key)}: {key}: {str(error).splitlines()[0]}") from None
    try:
        config = Config.model_validate(_integral(resolved))
    except ValidationError as error:
        raise UserError(*_problems(error, where)) from None
    plain = OmegaConf.to_container(merged, resolve=False)
    return config, _without_secrets(config.model_dump(), plain, resolved)


def _missing_file(path: Path) -> str:
    near = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
    hint = f"; there is {', '.join(near)}" if near else ""
    return f"{path}: no such config file{hint}"


def _merge(path: Path, text: str, overrides: list[str]) -> Any:
    try:
        base = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {what}") from None
    if not OmegaConf.is_dict(base):
        raise UserError(f"{path}: a config is a mapping of keys to values, not a list or a word")
    problems = [
        f"command line: {item!r} is not key=value; for a file, name it first"
        for item in overrides
        if "=" not in item or item.startswith("-") or not item.split("=", 1)[0].strip()
    ]
    if problems:
        raise UserError(*problems)
    for item in overrides:
        key, _, value = item.partition("=")
        try:
            # One at a time: the message can then name the culprit. `lora=null` then
            # `lora.r=8` must bring the section back, which force_add allows.
            parsed = OmegaConf.from_dotlist([item])
            OmegaConf.update(base, key, OmegaConf.select(parsed, key), merge=True, force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"command line: {key}={value}: cannot be read ({first})") from None
    return base


class _Where:
    """Says where a key's value was given: the command line, or a line of the file."""

    def __init__(self, path: Path, text: str, overrides: list[str]) -> None:
        self.path, self.lines = path, _line_of_each_key(text)
        self.overridden = [item.partition("=")[0] for item in overrides]

    def __call__(self, key: str) -> str:
        for name in self.overridden:
            if name == key or name.startswith(key + ".") or key.startswith(name + "."):
                return "command line"
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines[key]}" if key else str(self.path)


def _line_of_each_key(text: str) -> dict[str, int]:
    lines: dict[str, int] = {}

    def visit(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                key = f"{prefix}{name.value}"
                lines[key] = name.start_mark.line + 1
                visit(value, key + ".")

    visit(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return lines


def _integral(value: Any) -> Any:
    """Let `max_steps=1e3` be the 1000 that was meant; 1.5 stays a float and is refused."""
    if isinstance(value, dict):
        return {k: _integral(v) for k, v in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _problems(error: ValidationError, where: _Where) -> list[str]:
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "value_error":  # ours, already worded, one per line
            for line in item["msg"].removeprefix("Value error, ").splitlines():
                key = line.partition(":")[0]
                lines[line] = f"{where(key)}: {line}"
            continue
        # A union adds the branch that failed to the location ("constrained-str"): cut it off.
        key = _schema_path(item["loc"])
        if item["type"] == "extra_forbidden":
            text = _unknown(key)
        elif item["type"] == "missing":
            text = f"{key}: missing, and has no default"
        else:
            text = f"{key}: {item['input']!r} is not allowed: {_allowed(item)}"
        # Both branches of a union (text or list) complain: the first is enough, unless the
        # second knows better than that the type is another.
        if key not in lines or item["type"] == "too_short":
            lines[key] = f"{where(key)}: {text}"
    return list(lines.values())


def _schema_path(loc: tuple[int | str, ...]) -> str:
    model: type[BaseModel] | None = Config
    parts: list[str] = []
    for part in loc:
        if model is None:
            break
        parts.append(str(part))
        model = _section(model, str(part))
    return ".".join(parts)


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a key of `model` holds, or None where it holds a value."""
    field = model.model_fields.get(name)
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _allowed(item: Any) -> str:
    """Pydantic's message in the words of a config file."""
    text = item["msg"].removeprefix("Input should be ")
    words = {
        "a valid string": "text is expected (quote it, if YAML took it for something else)",
        "a valid integer": "a whole number is expected",
        "a valid number": "a number is expected",
        "a valid boolean": "true or false is expected",
        "a finite number": "a finite number is expected",
    }
    if item["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        return "a section of keys is expected"
    if item["type"] in {"string_too_short", "too_short"}:
        return "it must not be empty"
    return words.get(text, f"expected {text}")


def _all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in model.model_fields:
        section = _section(model, name)
        keys.append(prefix + name)
        keys += _all_keys(section, f"{prefix}{name}.") if section else []
    return keys


def _unknown(key: str) -> str:
    parent, _, leaf = key.rpartition(".")

    def likeness(candidate: str) -> float:
        section, _, name = candidate.rpartition(".")
        # The right word in the wrong section is likely (learning_rate), and so is a poor
        # word in the right one (lora.rank): both must get over the bar below.
        return difflib.SequenceMatcher(None, leaf, name).ratio() + 0.3 * (section == parent)

    best = max(_all_keys(), key=likeness)
    hint = f"; did you mean {best}?" if likeness(best) > 0.65 else ""
    return f"{key}: unknown key{hint}"


def _without_secrets(dumped: dict, plain: Any, resolved: Any) -> dict:
    secrets: set[str] = set()

    def collect(raw: Any, value: Any) -> None:
        if isinstance(raw, dict):
            for k in raw:
                collect(raw[k], value[k])
        elif isinstance(raw, list):
            for r, v in zip(raw, value, strict=True):
                collect(r, v)
        elif isinstance(raw, str) and "oc.env" in raw:
            secrets.add(str(value))

    def redact(value: Any, raw: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: redact(v, raw.get(k) if isinstance(raw, dict) else None)
                for k, v in value.items()
            }
        if isinstance(value, list) and isinstance(raw, list):
            return [redact(v, r) for v, r in zip(value, raw, strict=True)]
        # Also a value that reached here through another key: ${model.name}.
        return raw if raw and any(s and s in str(value) for s in secrets) else value

    collect(plain, resolved)
    return redact(dumped, plain)
