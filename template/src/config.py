"""The typed schema of a run's configuration; `load_config` finds every problem in one go.

Every default stands here once, with its reason. YAML files under `configs/` hold only what
differs, and the command line (`key=value`) overrides both.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from src.utils.environment import PROJECT_ROOT
from src.utils.errors import UserError, first_line

NotEmpty = Annotated[str, Field(min_length=1)]
Names = Annotated[list[NotEmpty], Field(min_length=1)]
Sources = NotEmpty | Names
ColumnName = Literal[
    "messages", "conversations", "prompt", "completion", "question", "answer",
    "instruction", "input", "output", "text", "tools", "system",
]  # fmt: skip


class Section(BaseModel):
    """A section of keys; wrong types and unknown keys are errors."""

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
    # 8bit takes 8.5 GiB and is slower: bitsandbytes waits for the GPU in every layer.
    quantization: Literal["4bit", "8bit", "none"] = "none"
    # auto: bf16 on a GPU that has it, fp16 with a loss scaler on one that has not, fp32 on a CPU.
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # auto: `varlen` for packed batches where model and GPU allow it, else `sdpa`, else `eager`.
    # Any other name goes to transformers as it is, e.g. flash_attention_2.
    attention: NotEmpty = "auto"
    # Recompute activations in the backward pass instead of keeping them. true: in every layer, for
    # 20 GiB instead of 40 and a third more time (compiled LoRA on 8B, 2 x 4096). auto: on a GPU, in
    # as few layers as its memory needs, which is tried before step 1; on a CPU in none.
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    # Keep each layer's input in the host's memory: for very long rows, and slower.
    gradient_checkpointing_offload: bool = False
    # Compile the layers, for which torch needs a C compiler: 13 to 22 s at the start, then a
    # quarter more tokens a second, and 40 GiB instead of 62 (LoRA on 8B, 2 x 4096 tokens, H200).
    # auto: on a GPU with packed rows, if the run is long enough to earn it back; not in 8 bits, and
    # not if it is `deterministic`.
    compile: bool | Literal["auto"] = "auto"
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
    # Divide by the root of r instead, which keeps large ranks learning (Kalajdzievski 2023).
    rslora: bool = False
    # Train the length of each weight's rows apart from their direction (DoRA, Liu et al. 2024):
    # closer to full fine-tuning at small ranks, and slower.
    dora: bool = False
    # Dropout keeps one more copy of each layer's input: about +50 % activation memory.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # all-linear: every linear layer but the head; better than attention alone (QLoRA, 2023).
    # In a mixture of experts PEFT adapts experts and router too, where it knows the architecture.
    target_modules: Sources = "all-linear"
    # Parameters outside of linear layers: experts that all-linear does not reach (training
    # prints their names).
    target_parameters: Names | None = None
    # Whole modules to train beside the adapters, and to save with them: [embed_tokens, lm_head]
    # where the tokenizer has new tokens. Tied weights stay tied.
    modules_to_save: Names | None = None
    # Continue training a saved adapter (a folder or a hub id) instead of a new one. Its own rank,
    # alpha and layers then apply, not the values above.
    adapter: NotEmpty | None = None


class DataConfig(Section):
    """Where rows come from and how they become batches."""

    # A .jsonl, .json, .csv or .parquet file, also .gz or .zst (relative to the project's root; *
    # stands for several), or a hub id with configuration and split: "org/name:main:train".
    train: Sources
    # The same, or a share of the training rows such as 0.02, or null for no evaluation.
    eval: Sources | Annotated[float, Field(gt=0, lt=1)] | None = None
    # If your columns have other names: {prompt: my_question, completion: my_answer}.
    columns: dict[ColumnName, NotEmpty] | None = None
    # Rows that cannot be read: stop and name them; or leave them out (see left_out.jsonl).
    bad_rows: Literal["stop", "skip"] = "stop"
    # drop: without reasoning (<think> or reasoning_content); template: as the template keeps it.
    thinking: Literal["template", "drop"] = "template"
    # Tokens of the longest document. A longer text becomes several documents.
    max_length: Annotated[int, Field(ge=8)] = 2048
    # A longer conversation is cut to max_length, or left out; both are counted.
    too_long: Literal["cut", "drop"] = "cut"
    # Lay documents end to end in one row of batch_size x max_length tokens: no padding. A model
    # that cannot keep them apart (state-space, linear attention) gets padded rows anyway.
    packing: bool = True
    # Processes that prepare batches. Tokens are memory-mapped, so 0 is enough for most runs.
    num_workers: NonNegativeInt = 0


class TrainingConfig(Section):
    """The optimisation, and what happens how often (all in optimizer steps)."""

    # Several processes: ddp, each has the whole model; fsdp, each a shard of it (also of moments
    # and gradients); hsdp, shards in a machine, copies across. auto: fsdp where ddp does not fit.
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    # Seconds to wait for a process that hangs; more than the main process ever works alone.
    timeout: PositiveInt = 1800
    # A microbatch is batch_size x data.max_length tokens.
    batch_size: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 1
    epochs: PositiveInt = 1
    # Stop after so many steps, even if epochs asks for more; null: no limit.
    max_steps: PositiveInt | None = None
    # LoRA's usual rate, about ten times a full fine-tuning's: give 2e-5 with lora=null.
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    # adamw8bit, for full fine-tuning: 8-bit moments; with bf16 matmuls also bf16 weights, updated
    # with stochastic rounding (torchao). 6 bytes a weight instead of 18.
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # Gradients above this norm are scaled down to it; null: never.
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    # A loss or gradient that is NaN or infinite: stop before the step, or skip it and count.
    on_non_finite: Literal["stop", "skip"] = "stop"
    log_every: PositiveInt = 10
    # null: once, at the end.
    eval_every: PositiveInt | None = None
    # Stop after so many evaluations (see eval_every) without a better loss; null: never.
    patience: PositiveInt | None = None
    # null: a checkpoint only of the best evaluation, and at a signal.
    save_every: PositiveInt | None = 100
    # Keep the newest so many, and always the best one.
    keep_checkpoints: PositiveInt = 2
    # never | auto: continue the newest whole checkpoint under output_dir, if there is one |
    # the path of a checkpoint, or of a run: its newest one.
    resume: NotEmpty = "never"
    # Resume although the model, the data or the batch geometry are not what they were.
    resume_despite_changes: bool = False
    # Train and evaluate on the first so many rows: a loss that does not reach zero reveals a
    # wrong mask, template or stop token within a minute.
    overfit: PositiveInt | None = None


class EvaluationConfig(Section):
    """What the model is asked before the first step and at each evaluation: samples.jsonl."""

    # null: the prompts of the first rows of data.eval.
    prompts: Names | None = None
    # How many of these rows. 0, without prompts: no answers are generated.
    samples: NonNegativeInt = 2
    # The most tokens of an answer.
    max_length: PositiveInt = 64


class TrackingConfig(Section):
    """MLflow; `metrics.jsonl` is written in any case."""

    enabled: bool = True
    experiment: NotEmpty = PROJECT_ROOT.name
    # null: the name of output_dir.
    run_name: NotEmpty | None = None
    # The result is stored as a model in MLflow, with its evaluation. Of a larger one MLflow only
    # learns which folder it is in.
    max_model_gib: Annotated[float, Field(ge=0)] = 1.0


class Config(Section):
    """One run."""

    _written: dict[str, Any] = {}

    seed: Annotated[NonNegativeInt, Field(lt=2**32)] = 42
    # The same bits on the same machine and versions; slower.
    deterministic: bool = False
    output_dir: NotEmpty
    device: Literal["auto", "cuda", "cpu"] = "auto"
    model: ModelConfig
    lora: LoraConfig | None = LoraConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def written(self) -> dict[str, Any]:
        """The same as plain data, each `${…}` as it was written: for `config.yaml` and MLflow."""
        return self._written

    def contradictions(self) -> Iterator[str]:
        """Yield what is wrong with keys that are right alone."""
        model, lora, training = self.model, self.lora, self.training
        quantized, fresh = model.quantization != "none", model.init == "random"
        if quantized and lora is None:
            yield "model.quantization: quantized weights are not trained; set lora, or use none"
        if quantized and fresh:
            yield "model.quantization: needs saved weights; use none, or model.init=pretrained"
        if lora and fresh:
            yield "lora: needs a base that is saved; use model.init=pretrained, or lora=null"
        if lora and lora.dora and model.quantization == "8bit":
            yield "lora.dora: PEFT loses the scales of 8-bit weights; use model.quantization=4bit"
        if lora and lora.target_parameters and (lora.dora or lora.dropout):
            yield "lora.target_parameters: PEFT needs lora.dora=false and lora.dropout=0"
        if model.gradient_checkpointing_offload and not model.gradient_checkpointing:
            yield "model.gradient_checkpointing_offload: needs model.gradient_checkpointing=true"
        if model.attention == "varlen" and not self.data.packing:
            yield "model.attention: varlen reads packed batches; set data.packing=true"
        if training.strategy in {"fsdp", "hsdp"} and (quantized or "8bit" in training.optimizer):
            yield "training.strategy: quantized weights and 8-bit moments are not sharded; use ddp"
        if training.patience and not training.eval_every:
            yield "training.patience: counts evaluations during training; set training.eval_every"
        if training.patience and not (self.data.eval or training.overfit):
            yield "training.patience: needs data.eval to measure progress on"


# The defaults; "-" stands for keys that must be given.
DEFAULTS = Config(output_dir="-", model=ModelConfig(name="-"), data=DataConfig(train="-"))


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Read a YAML file, apply `key=value` overrides, and validate everything.

    `stored`: a run wrote the file, perhaps before an update that removed keys, which are ignored,
    or that refuses some together.

    Returns:
        The typed config. Its `written` is the same as plain data, with every `${…}` as it was
        written and not what came out of it, so that no secret of the environment is ever stored.

    Raises:
        UserError: with one line per problem, each naming file and line, or the command line.
    """
    read, places = _read(Path(path))
    merged = _merge(read, overrides)
    for override in overrides:
        key = override.partition("=")[0]
        places[key] = "command line"
        while key := key.rpartition(".")[0]:
            places.setdefault(key, "command line")

    def located(problem: str) -> str:
        """The problem of a key, behind the file and line, or the command line, that gave it."""
        key = problem.partition(":")[0]
        while key and key not in places:
            key = key.rpartition(".")[0]
        return f"{places.get(key, path)}: {problem}"

    try:
        config = _validated(_resolved(merged), "ignore" if stored else "forbid")
        if not stored and (problems := [*config.contradictions()]):
            raise UserError(*problems)
    except UserError as error:
        raise UserError(*map(located, error.problems)) from None
    written: Any = OmegaConf.to_container(OmegaConf.merge(config.model_dump(), merged))
    config._written = written
    return config


def from_command_line(arguments: list[str]) -> Config:
    """The config that `[CONFIG] [key=value ...]` means; CONFIG is configs/train.yaml if not given.

    Raises:
        UserError: as `load_config`.
    """
    named = bool(arguments) and "=" not in arguments[0] and not arguments[0].startswith("-")
    path = arguments[0] if named else PROJECT_ROOT / "configs" / "train.yaml"
    return load_config(path, arguments[named:])


def changed(config: Config, keys: list[str], section: str = "") -> Config:
    """The config with these `key=value` instead, all of them of one section, such as `data.`.

    Raises:
        UserError: with one line per problem.
    """
    changes = _resolved(_merge({}, keys))
    if others := [key for key in keys if not key.startswith(section)]:
        raise UserError(*(f"command line: {key}: only {section} keys go here" for key in others))
    return _validated(_updated(config.model_dump(), changes))


def _updated(tree: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """A tree with the leaves of another one; not by OmegaConf, which would read `${…}` again."""
    old = tree if isinstance(tree, dict) else {}
    new = {k: _updated(old.get(k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return old | new


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """A YAML file's content, and the place of each key: `file:line`."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows leave a byte order mark
        node = yaml.compose(text)
        if not isinstance(node, yaml.MappingNode | None):
            problem = "a config is a mapping of keys to values, not a list or a word"
            raise UserError(f"{path}: {problem}")
        read = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    return read, {key: f"{path}:{line}" for key, line in _lines(node)}


def _merge(values: Any, overrides: Sequence[str]) -> Any:
    merged: Any = OmegaConf.create(values)
    for item in overrides:  # one at a time, so that a message can name the one that is wrong
        if item.startswith("-") or "=" not in item:
            problem = "options are written key=value, after a config file"
            raise UserError(f"command line: {item!r}: {problem}")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
            raise UserError(f"command line: {item}: cannot be read: {first_line(error)}") from None
    return merged


def _resolved(values: Any) -> Any:
    try:
        return OmegaConf.to_container(values, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def _validated(values: Any, extra: Literal["ignore", "forbid"] = "forbid") -> Config:
    try:
        return Config.model_validate(values, extra=extra)
    except ValidationError as error:
        raise UserError(*_problems(error)) from None


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Each key of a YAML file, with its dots, and the line that it stands on."""
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield prefix + name.value, name.start_mark.line + 1
        yield from _lines(value, f"{prefix}{name.value}.")


def _problems(error: ValidationError) -> Iterable[str]:
    """What is wrong with which key: `key: problem`."""
    problems: dict[str, str] = {}
    for item in error.errors():
        kind, names = item["type"], [str(part) for part in item["loc"]]
        key = ".".join(names)
        if kind == "extra_forbidden":
            nearest = _nearest(key)
            problems[key] = f"{key}: unknown key" + f"; did you mean {nearest}?" * bool(nearest)
        elif kind == "missing":
            problems[key] = f"{key}: missing, and has no default"
        else:
            # Where several types may stand, pydantic complains once of each, and the last name is
            # the type that it tried, such as "constrained-str".
            key = ".".join(name for name in names if name.isidentifier() and name != "bool")
            allowed = item["msg"].replace("Input should be", "expected")
            before = problems.get(key, f"{key}: {item['input']!r} is not allowed")
            problems[key] = f"{before}; {allowed}"
    return problems.values()


def _nearest(key: str) -> str:
    """The key that was meant: its last word or initials (lr), or a similar one; "": none."""
    defaults, leaf = DEFAULTS.model_dump(), key.rpartition(".")[2]
    known = [*defaults, *flatten(defaults)]
    ends = [(name, name.rpartition(".")[2]) for name in known]
    best = [n for n, end in ends if leaf in {end, "".join(w[0] for w in end.split("_"))}]
    return next(iter(best + difflib.get_close_matches(key, known, n=1)), "")
