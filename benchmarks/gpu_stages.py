"""The stages of gpu.py: what each does in its own process, and what it reports.

Of the project they call `load_tokenizer`, `build_model`, `set_attention`, `compile_layers`,
`load_trained`, `make_optimizer`, `train_epoch`, `generate`, `plan`, `collate_packed` and
`Document`; all else is its scripts.
"""

from __future__ import annotations

import gc
import inspect
import json
import operator
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import ChainMap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from compare import CUDA_CASES, LLAMA_8B, Bench, Measured, flops_per_token

if TYPE_CHECKING:
    from gpu import Campaign

TINY = LLAMA_8B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA_1B = LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
MIXED, PLAIN = "LoRA, mixed documents", "LoRA, whole documents"


def run_smoke(c: Campaign) -> None:
    """The smoke run learns its rows by heart."""
    started = time.perf_counter()
    final = c.smoke_model()
    c.record("smoke training, imports included", time.perf_counter() - started, "s")
    question = "What does LoRA train?"
    script, flags = str(c.project / "scripts" / "inference.py"), ["--device", c.device]
    answer = c.call([sys.executable, script, str(final), question, *flags]).strip()
    right = answer == _questions(c)[question]
    c.record("the sample's answer comes back", int(right), goal="== 1", note=repr(answer))


def _questions(c: Campaign) -> dict[str, str]:
    rows = map(json.loads, (c.project / "data" / "sample.jsonl").read_text().splitlines())
    chats = [row["messages"] for row in rows if len(row.get("messages", ())) == 2]
    return {question["content"]: answer["content"] for question, answer in chats}


def run_tests(c: Campaign) -> None:
    """The project's own tests marked `gpu`; where time runs out, those that were done."""
    folder = c.project / "tests"
    files = [str(path) for path in folder.glob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p"]
    command += ["no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning", *files]
    needing = {"bitsandbytes": ("4bit", "8bit"), "torchao": ("adamw8bit", "8bit_adamw")}
    absent = [name for name in needing if not find_spec(name)]
    if absent:
        command += ["-k", " and ".join(f"not {word}" for name in absent for word in needing[name])]
    log = c.work / "pytest.txt"
    with log.open("w") as file, suppress(subprocess.TimeoutExpired):
        limit = max(c.left() - 5, 1)
        subprocess.run(command, stdout=file, stderr=file, cwd=c.project, timeout=limit)
    text = log.read_text()
    done = re.findall(r"^\S+?::(.+?) (PASSED|SKIPPED|FAILED|ERROR)\b", text, re.MULTILINE)
    bad = [name for name, word in done if word in {"FAILED", "ERROR"}]
    counts = {kind: sum(word == kind for _, word in done) for kind in ("PASSED", "SKIPPED")}
    found = re.search(r"collected (\d+) items", text)
    whole = re.search(r"^=+ .* in [\d.]+s", text, re.MULTILINE)
    notes = [f"{counts['SKIPPED']} skipped", *(f"none that needs {name}" for name in absent)]
    if not whole:
        notes.append(f"cut off after {len(done)} of {found[1] if found else '?'}")
    c.record("gpu tests passed", counts["PASSED"], note=", ".join(notes))
    c.record("gpu tests failed", len(bad), goal="== 0", note=", ".join(bad))
    if bad or not done:
        print(text, file=sys.stderr)
    if not (counts["PASSED"] or (c.cpu and done)):
        raise RuntimeError(f"no test passed: {(text.splitlines() or ['no output'])[-1]}")


def run_deterministic(c: Campaign) -> None:
    """Two runs with `deterministic=true` end in the same bits."""
    outputs = [c.work / "deterministic" / name for name in "ab"]
    options = ("deterministic=true", "training.max_steps=30", "training.save_every=30")
    with ThreadPoolExecutor() as pool:  # at once: imports take most of the time
        list(pool.map(lambda output: c.call(c.smoke(output, *options)), outputs))
    c.record("largest difference of two runs", _difference(*outputs), goal="== 0")


def _difference(one: Path, other: Path) -> float:
    """Of the trained weights in the last checkpoints of two runs, fp32 as they are trained."""
    from safetensors.torch import load_file

    last = [max(run.glob("checkpoints/step-*")) / "weights" for run in (one, other)]
    first, second = (dict(ChainMap(*map(load_file, folder.iterdir()))) for folder in last)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def run_resume(c: Campaign) -> None:
    """A run killed between checkpoints goes on to the weights of one that was not."""
    base = ("model.init=pretrained", f"model.name={c.smoke_model()}")
    variants = {
        "full, adamw": (),
        "LoRA": ("lora.r=8", *base),
        "full, adamw8bit": ("lora=null", "training.optimizer=adamw8bit"),
    }
    if not find_spec("torchao"):
        c.record("full, adamw8bit", status="skipped", note="no torchao")
        del variants["full, adamw8bit"]

    def differ(name: str) -> float:
        options = ("deterministic=true", "training.max_steps=60", *variants[name])
        options += ("training.save_every=10", "training.log_every=1")
        straight, killed = (c.work / "resume" / name / end for end in ("straight", "killed"))
        c.call(c.smoke(straight, *options))
        _kill_after(15, c.smoke(killed, *options), killed / "metrics.jsonl", c.project)
        c.call(c.smoke(killed, *options, "training.resume=auto"))
        return _difference(straight, killed)

    with ThreadPoolExecutor() as pool:
        for name, future in [(name, pool.submit(differ, name)) for name in variants]:
            what, goal = f"largest difference after kill -9, {name}", "== 0"
            if error := future.exception():  # the other variants still count
                print(error, file=sys.stderr)
                c.record(what, goal=goal, note=str(error).splitlines()[0])
            else:
                c.record(what, future.result(), goal=goal)


def _kill_after(step: int, command: list[str], metrics: Path, folder: Path) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, **quiet)
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            process.kill()
        time.sleep(0.001)
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"exit {process.returncode} before it could be killed at step {step}")


def load(c: Campaign, shape: dict[str, Any], r: int | None = 16, **model: Any) -> Any:
    """A random model, with adapters unless r is None, by the project's own `build_model`."""
    import torch

    from src.config import LoraConfig, ModelConfig
    from src.models.attention import set_attention
    from src.models.model import build_model, compile_layers, load_tokenizer

    folder, device = c.work / f"shape-{shape['hidden_size']}", torch.device(c.device)
    config = ModelConfig(name=str(folder), init="random", **model)
    kind = _register_llama(device, in_4bit=config.quantization == "4bit")
    kind(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(folder)
    tokenizer = load_tokenizer(ModelConfig(name="configs/tiny"))
    lora = LoraConfig(r=r) if r else None
    model = build_model(config, lora, tokenizer, device, torch.bfloat16)
    set_attention(model, "auto", True, torch.bfloat16)
    if config.compile is True:
        compile_layers(model)
    if (attention := model.config._attn_implementation) != "varlen":
        raise RuntimeError(f"attention is {attention}: no figure would be that of packed documents")
    return model


def _register_llama(device: Any, in_4bit: bool) -> Any:
    """Name a Llama that `from_config` makes on the GPU, in 4 bits as `from_pretrained` makes it.

    A CPU takes minutes for 8 billion random weights, and bitsandbytes quantizes saved ones only.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class RandomConfig(LlamaConfig):
        model_type = "random_llama"

    class RandomLlama(LlamaForCausalLM):
        config_class = RandomConfig

        def __init__(self, config: RandomConfig) -> None:
            with device:
                super().__init__(config)
            linears = [n for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)]
            for name in linears if in_4bit else ():  # the head stays as it is
                self.model.set_submodule(name, _in_4bit(self.model.get_submodule(name)))
            self.is_loaded_in_4bit = in_4bit  # which PEFT asks

    AutoConfig.register("random_llama", RandomConfig, exist_ok=True)
    AutoModelForCausalLM.register(RandomConfig, RandomLlama, exist_ok=True)
    return RandomConfig


def _in_4bit(linear: Any) -> Any:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    kind = {"compress_statistics": True, "quant_type": "nf4"}
    size = (linear.in_features, linear.out_features)
    small = Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, device="meta", **kind)
    weight = Params4bit(linear.weight.data, module=small, **kind)
    small.weight = weight.to(linear.weight.device)  # this quantizes
    return small


def clear() -> None:
    """Give back what no variable names any more, and start the peak anew."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned memory, by powers of two, of checkpoints held there
        torch.cuda.reset_peak_memory_stats()


def documents(vocabulary: int, longest: int, budget: int, mixed: bool) -> Iterator[dict]:
    """Packed rows without end, every token labelled: lengths log-normal, or all the longest."""
    import numpy as np

    from inputs import SEED
    from src.data.batching import collate_packed
    from src.data.dataset import Document

    rng = np.random.default_rng(SEED)
    while True:
        row, free = [], budget
        while free:
            drawn = int(rng.lognormal(np.log(longest / 8), 1)) if mixed else longest
            ids = rng.integers(3, vocabulary, min(max(drawn, 16), longest, free), np.int32)
            row.append(Document(len(row), ids, ids))
            free -= len(ids)
        yield collate_packed(row, budget=budget, max_length=longest, pad_id=2)


@dataclass
class Steps:
    """What some steps took, the first ones apart."""

    rate: float  # tokens a second: the median
    seconds: float  # of a step: the mean
    before: float  # what the first ones took beyond that: warming up, or compiling
    peak: float  # GiB allocated, 0 on a CPU


def train(c: Campaign, model: Any, rows: Iterator[dict], first: int = 3, count: int = 8) -> Steps:
    """Take steps with the project's own loop, which is not made to wait for the GPU meanwhile."""
    import torch

    from src.config import TrainingConfig
    from src.training.optimizer import make_optimizer
    from src.training.trainer import training_steps

    def mark() -> Any:
        if c.cpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def pinned(row: dict[str, Any]) -> dict[str, Any]:  # as the project's loader makes it
        if c.cpu:
            return row
        return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in row.items()}

    def seconds(start: Any, end: Any) -> float:
        return end - start if c.cpu else start.elapsed_time(end) / 1e3

    clear()
    results, marks = [], [mark()]
    count = min(count, 3) if c.cpu else count

    batches = (pinned(next(rows)) for _ in range(first + count))
    optimizer = make_optimizer(model, TrainingConfig())
    for step in training_steps(model, batches, optimizer, None, c.device):
        results.append((step.tokens, step.finite))
        marks.append(mark())
    if not all(bool(finite) for _, finite in results):
        raise RuntimeError("a loss or a gradient is not finite")
    taken = [seconds(a, b) for a, b in pairwise(marks)]
    mean = statistics.mean(taken[first:])
    rates = [tokens / s for (tokens, _), s in zip(results, taken, strict=True)][first:]
    peak = 0.0 if c.cpu else torch.cuda.max_memory_allocated() / 2**30
    return Steps(statistics.median(rates), mean, sum(taken[:first]) - first * mean, peak)


def speed(c: Campaign, name: str, model: Any, mixed: bool = True, first: int = 3) -> Steps:
    """Train on microbatches of 2 x 4096 tokens, and report it."""
    shape = TINY if c.cpu else LLAMA_8B
    rows = documents(shape["vocab_size"], c.longest, 2 * c.longest, mixed)
    found = train(c, model, rows, first)
    facts = {"step_ms": 1e3 * found.seconds} | ({} if c.cpu else {"peak_gib": found.peak})
    matmul = next((row["value"] for row in c.rows() if row["unit"] == "TFLOP/s"), None)
    if matmul:
        row = next(documents(shape["vocab_size"], c.longest, 2 * c.longest, mixed))
        lengths = row["cu_seq_lens_q"].diff().double()
        length = float((lengths**2).sum() / lengths.sum())  # which attention sees, on average
        facts["share"] = found.rate * flops_per_token(shape, length) / (matmul * 1e12)
    if "compiled" in name:
        from torch._dynamo.utils import counters

        facts |= {"compile_s": found.before, "graphs": counters["stats"]["unique_graphs"]}
        facts |= {"graph_breaks": sum(counters["graph_break"].values())}
    c.record(name, found.rate, "tokens/s", **facts)
    return found


def run_lora(c: Campaign) -> None:
    """LoRA on bf16 weights, against what this GPU multiplies at."""
    from inputs import measure_matmul

    shape = TINY if c.cpu else LLAMA_8B
    if not c.cpu:
        c.record("bf16 matmul", measure_matmul(), "TFLOP/s")
    # First what takes the least memory, in case the other does not fit.
    speed(c, f"{MIXED}, checkpointing", load(c, shape, gradient_checkpointing=True))
    model = load(c, shape)
    speed(c, MIXED, model)
    speed(c, PLAIN, model, mixed=False)
    share = next((row.get("share") for row in c.rows() if row["name"] == PLAIN), None)
    if share is not None:
        c.record("LoRA, share of the ceiling", share, goal=">= 0.60")


def run_qlora(c: Campaign) -> None:
    """LoRA on 4-bit weights."""
    from peft.tuners.lora.bnb import Linear4bit

    shape = TINY if c.cpu else LLAMA_8B
    model = load(c, shape, quantization="4bit", gradient_checkpointing=True)
    adapted = sum(isinstance(module, Linear4bit) for module in model.modules())
    if adapted != 7 * shape["num_hidden_layers"]:
        raise RuntimeError(f"PEFT took {adapted} layers for 4-bit ones")
    length = c.longest // 2
    found = train(c, model, documents(shape["vocab_size"], length, 4 * length, True), 2, 3)
    if not c.cpu:
        c.record("4-bit, checkpointing, 4 x 2048: peak", found.peak, "GiB", goal="< 16")
    speed(c, f"4-bit {MIXED}, checkpointing", model)
    del model
    clear()
    found = speed(c, f"4-bit {MIXED}", load(c, shape, quantization="4bit"))
    for row in c.rows():
        if row["name"] == MIXED:
            c.record("4-bit/bf16 tokens/s", found.rate / row["value"], goal=">= 0.95")


def run_plan(c: Campaign) -> None:
    """The peak that `plan` tells beforehand, against the one that steps have."""
    import torch

    from src.config import Config, DataConfig, LoraConfig, ModelConfig, TrainingConfig
    from src.training.plan import plan

    kinds = [("LoRA", LLAMA_8B, 16, "none"), ("full, 1B", LLAMA_1B, None, "none")]
    if find_spec("bitsandbytes"):
        kinds.insert(1, ("4-bit LoRA", LLAMA_8B, 16, "4bit"))
    for name, shape, r, bits in kinds:
        for checkpointing in (True, False):
            shape = TINY if c.cpu else shape
            settings = {"quantization": bits, "gradient_checkpointing": checkpointing}
            model = load(c, shape, r, **settings)
            rows = documents(shape["vocab_size"], c.longest, 2 * c.longest, mixed=False)
            found = train(c, model, rows, 1, 2)
            del model
            clear()
            config = Config(
                output_dir="unused",
                model=ModelConfig(name=str(c.work / f"shape-{shape['hidden_size']}"), **settings),
                lora=LoraConfig(r=r) if r else None,
                data=DataConfig(train="unused", max_length=c.longest),
                training=TrainingConfig(batch_size=2),
            )
            _register_llama(torch.device("meta"), in_4bit=False)  # the plan quantizes itself
            planned = plan(config)
            peak = planned.peak_gib - planned.overhead
            what = f"plan of {name}{', checkpointing' * checkpointing}"
            c.record(what, peak, "GiB", peak_gib=found.peak)
            if not c.cpu:
                c.record(f"{what}: off by", abs(peak / found.peak - 1), goal="<= 0.10")


def run_compile(c: Campaign) -> None:
    """LoRA with compiled layers: mixed documents, then whole ones."""
    model = load(c, TINY if c.cpu else LLAMA_8B, compile=True)
    _against_eager(c, MIXED, model, first=8)
    _against_eager(c, PLAIN, model, mixed=False)


def settled(model: Any, rows: int, length: int, checkpointing: bool | str) -> Any:
    """The model with its loss, after the decisions that a long run takes before step 1."""
    import torch

    from src.config import Config, DataConfig, ModelConfig, TrainingConfig
    from src.training.auto import prepare_layers
    from src.training.checkpoint import TrainState
    from src.training.optimizer import make_optimizer
    from src.training.trainer import as_objective

    settings = TrainingConfig(batch_size=rows)
    objective = as_objective(model, torch.bfloat16)
    config = Config(
        output_dir="unused", training=settings, data=DataConfig(train="unused", max_length=length),
        model=ModelConfig(name="unused", gradient_checkpointing=checkpointing),
    )  # fmt: skip
    run: Any = SimpleNamespace(
        config=config, model=model, objective=objective, state=TrainState(),
        optimizer=make_optimizer(model, settings), train_loader=SimpleNamespace(packing=True),
        total_steps=100_000,
    )  # fmt: skip
    prepare_layers(run)
    return objective


def run_defaults(c: Campaign) -> None:
    """The default settings of a long run; and those of configs/train.yaml on two sizes of card."""
    from inputs import measure_matmul

    shape = TINY if c.cpu else LLAMA_8B
    if not c.cpu:
        c.record("bf16 matmul", measure_matmul(), "TFLOP/s")
    name = f"{PLAIN}, default settings"
    objective = settled(load(c, shape), 2, c.longest, "auto")
    speed(c, name, objective, mixed=False)
    if share := next((row.get("share") for row in c.rows() if row["name"] == name), None):
        c.record("default settings, share of the ceiling", share, goal=">= 0.68")
    del objective
    length, rates = c.longest // 2, []
    for card, checkpointing in ((1000, "auto"), (1000, False), (24, "auto"), (24, True)):
        clear()
        _card_of(card)
        model = load(c, shape, quantization="4bit", gradient_checkpointing=checkpointing is True)
        objective = settled(model, 4, length, checkpointing)
        rows = documents(shape["vocab_size"], length, 4 * length, mixed=True)
        found = train(c, objective, rows, 3, 6)
        rates.append(found.rate)
        where = f"24 GiB, {checkpointing}" if card == 24 else f"a card with room, {checkpointing}"
        peak = {} if c.cpu else {"peak_gib": found.peak}
        c.record(f"train.yaml, 4-bit, 4 x 2048, {where}", found.rate, "tokens/s", **peak)
        del model, objective
    _card_of(1000)
    c.record("auto/nothing recomputed, a card with room", rates[0] / rates[1], goal=">= 0.97")
    c.record("auto/every layer recomputed, 24 GiB", rates[2] / rates[3], goal=">= 1.1")


def run_compile_checkpointing(c: Campaign) -> None:
    """The same with gradient checkpointing."""
    model = load(c, TINY if c.cpu else LLAMA_8B, compile=True, gradient_checkpointing=True)
    _against_eager(c, f"{MIXED}, checkpointing", model, first=8)


def run_compile_4bit(c: Campaign) -> None:
    """The same on 4-bit weights."""
    model = load(c, TINY if c.cpu else LLAMA_8B, compile=True, quantization="4bit")
    _against_eager(c, f"4-bit {MIXED}", model, first=8)


def _against_eager(c: Campaign, name: str, model: Any, mixed: bool = True, first: int = 3) -> None:
    """What compiled layers do, against the stage that took the same steps without compiling."""
    found = speed(c, f"{name}, compiled", model, mixed, first)
    eager = next((row["value"] for row in c.rows() if row["name"] == name), None)
    if eager:
        c.record(f"{name}, compiled/not", found.rate / eager)


def run_scripts(c: Campaign) -> None:
    """Each script as a user runs it: a random 1B model, and the keys of configs/train.yaml."""
    from inputs import write_model, write_rows, write_tokenizer

    base, rows, run = c.work / "1b", c.work / "scripts.jsonl", c.work / "scripts"
    write_tokenizer(base)
    write_model(base, (TINY | {"vocab_size": 16_384}) if c.cpu else LLAMA_1B, c.device)
    write_rows(rows, "chats", 60 if c.cpu else 2000)
    keys = [f"model.name={base}", f"data.train={rows}", "data.eval=0.05", f"output_dir={run}"]
    keys += ["tracking.enabled=false", f"device={c.device}", "training.eval_every=4"]
    keys += ["training.max_steps=8", "training.epochs=99"]
    on, out = ["--device", c.device], c.work / "exported"
    for name, arguments, good in (
        ("doctor", keys, {0, 1}),  # 1: it advises something
        ("plan", [*keys, "--gpu", "h100"], {0}),
        ("train", keys, {0}),
        ("train", [*keys, "training.resume=auto", "training.max_steps=12"], {0}),
        ("inference", [str(run), "What is it?", "And why is that so?", *on], {0}),
        ("inference", [str(run / "checkpoints" / "step-00000012"), "What is it?", *on], {0}),
        ("evaluate", [str(run), str(rows), "--samples", "4", *on], {0}),
        ("export", [str(run), str(out)], {0}),
        ("inference", [str(out), "What is it?", *on], {0}),
    ):
        script, began = str(c.project / "scripts" / f"{name}.py"), time.perf_counter()
        done = subprocess.run(
            [sys.executable, script, *arguments], capture_output=True, text=True, cwd=c.project
        )
        last = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""
        seconds = time.perf_counter() - began
        c.record(f"scripts/{name}.py, imports included", seconds, "s", note=last)
        if done.returncode not in good:
            print(done.stdout, done.stderr, file=sys.stderr)
            raise RuntimeError(f"scripts/{name}.py: exit {done.returncode}: {last}")


def run_processes(c: Campaign) -> None:
    """Two processes on two GPUs end with the losses of one, in either strategy."""
    import torch

    if not c.cpu and torch.cuda.device_count() < 2:
        c.record("two processes", status="skipped", note="one GPU")
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2"]
    losses: dict[str, float] = {}
    for name in ("one", "ddp", "fsdp"):
        run = c.work / f"processes-{name}"
        window = f"training.gradient_accumulation_steps={4 if name == 'one' else 2}"
        strategy = f"training.strategy={'auto' if name == 'one' else name}"
        command = c.smoke(run, window, strategy, "training.max_steps=12", "training.log_every=12")
        c.call(command if name == "one" else [*torchrun, *command[1:]])
        last = (run / "metrics.jsonl").read_text().splitlines()[-1]
        losses[name] = json.loads(last)["loss"]
    for name in ("ddp", "fsdp"):
        off = abs(losses[name] / losses["one"] - 1)
        c.record(f"loss of two processes, {name}: off by", off, goal="<= 0.02")


def run_trl(c: Campaign) -> None:
    """Short chats at the width of 8B and 8 layers, against TRL's packing."""
    found = _against_trl(c, 8, "LoRA, chats", 15, ["ours", "packing"])
    ratio = found["ours"].tokens_per_second / found["packing"].tokens_per_second
    c.record("tokens/s against TRL's packing", ratio, goal=">= 1.15")
    if not c.cpu:
        peaks = found["ours"].peak / found["packing"].peak
        c.record("peak against TRL's packing", peaks, goal="<= 0.8")


def run_peers(c: Campaign) -> None:
    """Whole documents at 8B's full depth: ours and TRL's packing, with and without Liger."""
    # Compiled, as a run that is long enough is by default.
    sides = ["ours, compiled"] + ["liger"] * bool(find_spec("liger_kernel")) + ["packing"]
    found = _against_trl(c, 32, "LoRA, documents", 12, sides)
    ours = found.pop("ours, compiled")
    for side, theirs in found.items():
        ratio = ours.tokens_per_second / theirs.tokens_per_second
        c.record(f"tokens/s against TRL, {side}", ratio, goal=">= 1.30")
        if not c.cpu:
            c.record(f"peak against TRL, {side}", ours.peak / theirs.peak, goal="<= 0.85")
    if "liger" not in sides:
        c.record("TRL with Liger", status="skipped", note="no liger_kernel")


def _against_trl(
    c: Campaign, layers: int, name: str, steps: int, sides: list[str]
) -> dict[str, Measured]:
    """The same rows, trained on by each side in processes of its own."""
    bench = Bench(c.work / f"trl-{layers}", c.project, c.device, [])
    bench.environment["PYTHONPATH"] = f"{bench.project}{os.pathsep}{os.environ['PYTHONPATH']}"
    shape = LLAMA_8B | {"num_hidden_layers": layers}
    case = replace(next(x for x in CUDA_CASES if x.name == name), steps=steps)
    if c.cpu:
        shape, case = TINY | {"vocab_size": 16_384}, replace(case, rows=100, max_length=64, steps=5)
    model = str(bench.folder / "model")
    bench.make("tokenizer", model)
    bench.make("model", model, json.dumps(shape), c.device)
    bench.make("rows", str(bench.rows(case)), case.kind, str(case.rows))
    found = {}
    for side in sides:
        cache = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=bench.folder))
        label = f"{shape['num_hidden_layers']} layers, {case.name}: {side}"
        try:
            measured = bench._train(side, case, cache, case.steps)
        except SystemExit as error:  # compare.py's: a peer's traceback
            print(error, file=sys.stderr)
            c.record(label, status="failed", note=str(error).strip().splitlines()[-1])
            continue
        peak = {} if c.cpu else {"peak_gib": measured.peak}
        c.record(label, measured.tokens_per_second, "tokens/s", start_s=measured.cold, **peak)
        found[side] = measured
    return found


def run_generate(c: Campaign) -> None:
    """A batch of prompts is answered as each prompt alone; how fast both are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.models.generation import generate
    from src.trained import find_trained, load_trained

    asked = sorted(_questions(c), key=len)
    prompts = [asked[n * (len(asked) - 1) // 7] for n in range(8)]  # the shortest to the longest
    model, tokenizer = load_trained(find_trained(str(c.smoke_model())), torch.device(c.device))
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        together = generate(model, tokenizer, prompts, 64)
        alone = [generate(model, tokenizer, prompt, 64) for prompt in prompts]
        equal = sum(map(operator.eq, together, alone))
        goal = "== 8" if dtype == torch.float32 else ""  # bf16 may round a tie either way
        c.record(f"8 prompts as one by one, {str(dtype)[6:]}", equal, "equal", goal)
    config = LlamaConfig(**(TINY if c.cpu else LLAMA_1B), bos_token_id=0, eos_token_id=1)
    with torch.device(c.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    length = 8 if c.cpu else 128

    def rate(asked: list[str]) -> float:
        calls.clear()
        started = time.perf_counter()
        generate(model, tokenizer, asked, length)
        return len(asked) * len(calls) / (time.perf_counter() - started)

    for size in (1, 16):
        asked = (prompts * 2)[:size]
        first = rate(asked)
        # A new process is cold for several answers: 13, 47 and 100 tokens/s were seen in a row.
        for _ in range(1 if c.cpu else 4):
            rate(asked)
        warm = statistics.median(rate(asked) for _ in range(3))
        c.record(f"random 1B, batch of {size}", warm, "tokens/s", cold=first)


def run_long_job(c: Campaign) -> None:
    """Sixteen batches, for which `generate` compiles, against transformers' own static cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.config import ModelConfig
    from src.models.generation import generate
    from src.models.model import load_tokenizer

    tokenizer, length = load_tokenizer(ModelConfig(name="configs/tiny")), 8 if c.cpu else 128
    config = LlamaConfig(**(TINY if c.cpu else LLAMA_1B), bos_token_id=0, eos_token_id=1)
    with torch.device(c.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    prompts = [f"Question {n}: {'what is it, ' * (n % 5)}and why?" for n in range(16)]

    def seconds(work: Any) -> float:
        work()  # compiles
        started = time.perf_counter()
        work()
        if not c.cpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 2}
    model.generation_config.eos_token_id = None  # both write all tokens
    theirs = seconds(lambda: model.generate(**inputs, **options, cache_implementation="static"))
    batches = 2 if c.cpu else 16
    ours = seconds(lambda: generate(model, tokenizer, prompts * batches, length)) / batches
    c.record("16 prompts, a long job", 16 * length / ours, "tokens/s")
    c.record("16 prompts, transformers' static cache", 16 * length / theirs, "tokens/s")
    c.record("a long job against the static cache", theirs / ours, goal=">= 0.95")


def run_longest(c: Campaign) -> None:
    """How long one document may be for a 4-bit LoRA r=32, a card's memory being given."""
    from transformers import PreTrainedModel as Model

    name = "activation_checkpointing_enable"  # of transformers 5.23 and later
    enable = getattr(Model, name, None) or Model.gradient_checkpointing_enable
    can_offload = "offload" in inspect.signature(enable).parameters
    cards = {12: 3, 24: 2, 80: 1}  # GiB, and a part of the time: the goal's has the most
    parts = 2 * sum(cards.values())
    for offload in (True, False):
        what = f"longest document, {'checkpoints in host memory' if offload else 'checkpointing'}"
        if offload and not can_offload:
            note = f"transformers {version('transformers')} has no offload"
            c.record(what, status="skipped", note=note)
            parts -= sum(cards.values())
            continue
        options = {"gradient_checkpointing": True, "gradient_checkpointing_offload": offload}
        model = load(c, TINY if c.cpu else LLAMA_8B, 32, quantization="4bit", **options)
        short = c.longest // 4  # kernels that are loaded now are not taken for activations
        train(c, model, documents(model.config.vocab_size, short, short, mixed=False), 1, 1)
        clear()
        tried: dict[int, tuple[float, float]] = {}
        for gib, part in cards.items():
            limit = 0.0 if c.cpu else _card_of(gib)
            until, parts = time.time() + (c.left() - 5) * part / parts, parts - part
            length, note = _search(c, model, tried, limit, until)
            if not length:
                c.record(f"{what}, {gib} GiB", status="skipped", note=note)
                continue
            goal = ">= 22000" if gib == 12 else ""
            c.record(f"{what}, {gib} GiB", length, "tokens", goal, note)
        del model
        _card_of(1000)


def _card_of(gib: int) -> float:
    """Let torch have what a card of this size would leave it, in GiB."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()  # what CUDA itself takes, of any card
    share = min(1.0, (gib * 2**30 - context) / total)
    torch.cuda.set_per_process_memory_fraction(share)
    return share * total / 2**30


def _search(
    c: Campaign, model: Any, tried: dict[int, tuple[float, float]], limit: float, until: float
) -> tuple[int, str]:
    """The longest document that takes two steps, to some 5 %, and what stopped the search.

    Args:
        c: the campaign.
        model: to train.
        tried: GiB and seconds of each length that fitted, on smaller cards too; a straight line
            through the last two says what to try next.
        limit: GiB.
        until: when to stop, in time.time()'s seconds.
    """
    vocabulary, fails = (TINY if c.cpu else LLAMA_8B)["vocab_size"], 0
    while True:
        *_, a, b = (0, 0, *sorted(tried))
        if fails:
            length = int(0.95 * fails)
        elif a == 0:
            length = 2 * b or c.longest
        else:
            slope = (tried[b][0] - tried[a][0]) / (b - a)
            length = int(b + 0.98 * (limit - tried[b][0]) / slope) if slope > 0 else b
        if length < 1.03 * b:
            return b, f"{fails:,} does not fit" if fails else f"{tried[b][1]:.1f} s for two steps"
        # Attention grows with the square: of what lies ahead, that is the most it can take.
        ahead = tried[b][1] * (length / b) ** 2 if b else 0.0
        if (started := time.time()) + ahead > until:
            # What there is time for, at the worst: a bound from below that ends.
            left = max(until - started, 0.0)
            affordable = int(0.9 * b * (left / tried[b][1]) ** 0.5) if b else 0
            if affordable < max(1.03 * b, 1):
                return b, f"at least; no time to try {length:,}"
            length = affordable
        try:
            rows = documents(vocabulary, length, length, mixed=False)
            peak = train(c, model, rows, first=1, count=1).peak
            tried[length] = peak, time.time() - started
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not re.search("out of memory|alloc_failed", str(error), re.IGNORECASE):
                raise
            fails = length
        model.zero_grad(set_to_none=True)
