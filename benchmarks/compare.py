"""Train the same model on the same rows with the rendered project and with TRL, side by side.

    uv run --group benchmark benchmarks/compare.py train         # on a CPU: a small model, chats
    uv run --group benchmark benchmarks/compare.py train --cuda  # Llama-3.1-8B's shape, 80 GB
    uv run --group benchmark benchmarks/compare.py data          # 100,000 rows against 1,000,000

Ours is `scripts/train.py` as it is, in a copy of `template/`; theirs is `trl_sft.py`, with TRL's
default (padded, 8 rows) and with `packing=True`. Both load one saved model of random bf16 weights,
train a LoRA r=16 on all projections with fused AdamW in bf16 (or --dtype fp32), without gradient
checkpointing, and put the loss on the same tokens. Every measurement is a fresh process with a
fresh cache, the sides alternate, and a ratio compares neighbours of one round: what the machine
does beside it then falls on both. Then each starts again on its cache, for the time to step 1.

This process imports the standard library only: on Linux a child's peak memory is never less than
what its parent held when it was started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE.parent / "template"
STEP = re.compile(r"step +(\d+)")

# About 4.7 M parameters, of which 3.1 M are the tied embedding of the 16,384 tokens.
SMALL = {
    "vocab_size": 16_384,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """One training, done by every side."""

    name: str
    kind: str  # of rows: see inputs.py
    rows: int
    max_length: int
    batch_size: int  # a microbatch of ours and of TRL's packing is batch_size x max_length tokens
    padded_rows: int  # in a batch of TRL's default
    quantization: str = "none"
    steps: int = 16  # of ours and of TRL's packing
    padded_steps: int = 34  # smaller batches: more of them, for about as many tokens
    skipped: int = 3  # first steps that do not count: allocators and caches warm up


CPU_CASES = [Case("LoRA, chats", "chats", 4000, 512, 4, 8)]
CUDA_CASES = [
    Case(f"{name}, {kind}", kind, rows, 4096, 2, padded, quantization, 20, steps)
    for kind, rows, padded, steps in (("documents", 200, 2, 20), ("chats", 4000, 8, 40))
    for name, quantization in (("LoRA", "none"), ("QLoRA", "4bit"))
]


@dataclass
class Measured:
    """What one process did."""

    tokens_per_second: float
    labelled_per_second: float
    peak: float  # GiB: resident on a CPU, allocated on a GPU
    cold: float  # seconds from process start to the first optimizer step
    warm: float = float("nan")  # the same on the second start, which reuses the tokens


GOALS = {  # by side, kind of machine and quantity; see RESULTS.md
    ("packing", "cpu", "tokens_per_second"): ">= 3.3",
    ("default", "cpu", "tokens_per_second"): ">= 5",
    ("packing", "cpu", "peak"): "<= 0.52",
    ("packing", "cpu", "warm"): "<= 0.75",
    ("packing", "cpu", "cold"): "<= 0.75",
    ("packing", "cuda", "tokens_per_second"): ">= 1.15",
    ("packing", "cuda", "peak"): "<= 0.8",
}
QUANTITIES = {
    "tokens_per_second": ("real tokens/s", ",.0f"),
    "labelled_per_second": ("labelled tokens/s", ",.0f"),
    "peak": ("peak memory, GiB", ".2f"),
    "cold": ("start to step 1, first time, s", ".1f"),
    "warm": ("start to step 1, tokens cached, s", ".1f"),
}


class Bench:
    """Inputs in a temporary folder, and the processes that are measured on them."""

    def __init__(
        self, folder: Path, project: Path, device: str, overrides: list[str], dtype: str = "bf16"
    ) -> None:
        self.folder, self.device, self.overrides, self.dtype = folder, device, overrides, dtype
        # A copy: what others edit meanwhile does not change what is measured.
        self.project = folder / "project"
        shutil.copytree(project, self.project, ignore=shutil.ignore_patterns(".venv", "outputs"))
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(self.project),
            "OMP_NUM_THREADS": str(cpus()),
            # Ours sets it for itself. On a busy machine it makes both sides faster, so both get it.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        # As on a user's machine: Python keeps what it compiled, for either side.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def make(self, *arguments: str) -> str:
        """Run one of inputs.py's functions in a process of its own."""
        command = [sys.executable, str(HERE / "inputs.py"), *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def ours(self, case: Case, steps: int, cache: Path, output: Path) -> list[str]:
        """The command that trains with the rendered project."""
        config = {
            "output_dir": str(output),
            "device": self.device,
            "model": {
                "name": str(self.folder / "model"),
                "quantization": case.quantization,
                "dtype": self.dtype,
            },
            "data": {"train": str(self.rows(case)), "max_length": case.max_length},
            "training": {
                "batch_size": case.batch_size,
                "max_steps": steps,
                "epochs": 100,
                "learning_rate": 2e-4,
                "scheduler": "constant",
                "log_every": 1,
                "save_every": None,
            },
            "tracking": {"enabled": False},
        }
        path = cache / "config.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        script = self.project / "scripts" / "train.py"
        return [sys.executable, str(script), str(path), *self.overrides]

    def theirs(self, case: Case, steps: int, cache: Path, output: Path, side: str) -> list[str]:
        """The command that trains with TRL: its default, its packing, or that with Liger."""
        packing = side != "default"
        settings = {
            "model": str(self.folder / "model"),
            "rows": str(self.rows(case)),
            "output": str(output),
            "device": self.device,
            "quantization": case.quantization,
            "dtype": self.dtype,
            "packing": packing,
            "liger": side == "liger",
            "max_length": case.max_length,
            "batch_size": case.batch_size if packing else case.padded_rows,
            "steps": steps,
            "learning_rate": 2e-4,
            "seed": 42,
        }
        path = cache / "settings.json"
        path.write_text(json.dumps(settings))
        return [sys.executable, str(HERE / "trl_sft.py"), str(path)]

    def rows(self, case: Case) -> Path:
        """The file of a case's rows."""
        return self.folder / f"{case.kind}.jsonl"

    def train(self, side: str, case: Case) -> Measured:
        """Measure one training, then the start of a second one that finds the tokens cached."""
        cache = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=self.folder))
        steps = case.padded_steps if side == "default" else case.steps
        measured = self._train(side, case, cache, steps)
        measured.warm = self._train(side, case, cache, 1).cold
        shutil.rmtree(cache)
        return measured

    def start(self, side: str, case: Case) -> None:
        """Take one step, unmeasured."""
        cache = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=self.folder))
        self._train(side, case, cache, 1)
        shutil.rmtree(cache)

    def _train(self, side: str, case: Case, cache: Path, steps: int) -> Measured:
        output = Path(tempfile.mkdtemp(dir=cache)) / "run"
        if side.startswith("ours"):
            command = self.ours(case, steps, cache, output)
            command += ["model.compile=true"] * (side == "ours, compiled")
        else:
            command = self.theirs(case, steps, cache, output, side)
        done, resident = self.watch(command, cache)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if "labelled_tokens" not in line:  # ours gives rates; each line is one step
                share = line["labelled_tokens_per_second"] / line["tokens_per_second"]
                step = line["step"]
                before = lines[step - 2] if step > 1 else {"tokens": 0, "labelled_tokens": 0}
                real = line["tokens"] - before["tokens"]
                line["labelled_tokens"] = before["labelled_tokens"] + real * share
        first, last = lines[min(case.skipped, steps) - 1], lines[-1]
        seconds = (done[last["step"]] - done[first["step"]]) or float("nan")
        return Measured(
            (last["tokens"] - first["tokens"]) / seconds,
            (last["labelled_tokens"] - first["labelled_tokens"]) / seconds,
            last.get("peak_memory_gib", resident),
            done[1],
        )

    def watch(self, command: list[str], cache: Path) -> tuple[dict[int, float], float]:
        """Run to the end: seconds from the start to each step's line, and peak resident GiB."""
        done: dict[int, float] = {}
        with (cache / "stderr.txt").open("w") as errors:
            started = time.perf_counter()
            process = subprocess.Popen(
                command,
                env=self.environment | {"HF_HOME": str(cache)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for line in process.stdout or ():
                if match := STEP.match(line):
                    done[int(match[1])] = time.perf_counter() - started
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command}\n{(cache / 'stderr.txt').read_text()}")
        return done, usage.ru_maxrss / 2**20  # Linux counts in KiB


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def compare(bench: Bench, cases: list[Case], rounds: int) -> dict[tuple[str, str], list[Measured]]:
    """Measure every case with every side, round after round."""
    sides = ["ours", "packing", "default"]
    for side in sides:  # files come into the page cache, Python compiles what it imports
        bench.start(side, cases[0])
    results: dict[tuple[str, str], list[Measured]] = {}
    for number in range(1, rounds + 1):
        for case in cases:
            for side in sides:
                measured = bench.train(side, case)
                print(f"{number}/{rounds} {case.name} {side} {measured}", file=sys.stderr)
                results.setdefault((case.name, side), []).append(measured)
    return results


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, and the least and the greatest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def print_table(results: dict[tuple[str, str], list[Measured]], device: str) -> None:
    """Ours against each of theirs: medians, and the ratios of the rounds."""
    print("| case | against TRL's | quantity | ours | theirs | ours/theirs (min-max) | goal |")
    print("|---|---|---|---:|---:|---:|---:|")
    for (case, side), theirs in results.items():
        ours = results[case, "ours"]
        for key, (name, form) in QUANTITIES.items():
            if side == "ours":
                continue
            pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(ours, theirs, strict=True)]
            a, b = (format(statistics.median(column), form) for column in zip(*pairs, strict=True))
            goal = GOALS.get((side, device, key), "")
            ratio = spread([a / b for a, b in pairs])
            print(f"| {case} | {side} | {name} | {a} | {b} | {ratio} | {goal} |")


def flops_per_token(shape: dict[str, Any], length: float, r: int = 16) -> float:
    """Of LoRA: 4N + 3a + 6 N_lora, since frozen weights need no gradient of their own."""
    hidden, layers, wide = (
        shape[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    matrices = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, wide)] * 3
    weights = layers * sum(a * b for a, b in matrices) + shape["vocab_size"] * hidden
    adapters = layers * sum(r * (a + b) for a, b in matrices)
    attention = 2 * 2 * layers * hidden * length / 2  # causal, forward, at this document length
    return 4 * weights + 3 * attention + 6 * adapters


def print_gpu_shares(bench: Bench, results: dict[tuple[str, str], list[Measured]]) -> None:
    """The share of a matmul measured here and now, and QLoRA against LoRA."""
    tflops = float(bench.make("matmul"))
    ceiling = tflops * 1e12 / flops_per_token(LLAMA_8B, 4096)
    ours = {case: runs for (case, side), runs in results.items() if side == "ours"}
    lora = [m.tokens_per_second for m in ours["LoRA, documents"]]
    qlora = [m.tokens_per_second for m in ours["QLoRA, documents"]]
    print(f"\nbf16 matmul: {tflops:.0f} TFLOP/s, so at most {ceiling:,.0f} tokens/s at 4096")
    print(f"our share of it, LoRA: {spread([x / ceiling for x in lora])}; goal >= 0.60")
    pairs = [b / a for a, b in zip(lora, qlora, strict=True)]
    print(f"our QLoRA/LoRA at 8192 tokens a microbatch: {spread(pairs)}; goal >= 0.95")


def print_machine(device: str) -> None:
    """What the figures below were measured on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    print(f"machine: {cpus()} cores, {names[0] if names else platform.processor()}")
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        print("GPU:", subprocess.run(query, check=True, capture_output=True, text=True).stdout)
    packages = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "trl")
    python = f"python {platform.python_version()}"
    print("versions:", ", ".join([python, *(f"{p} {version(p)}" for p in packages)]) + "\n")


def prepare_data(bench: Bench, counts: list[int], rounds: int) -> None:
    """Tokenise and batch so many rows: seconds and peak memory, for the first and a later start."""
    for count in counts:
        bench.make("rows", str(bench.folder / f"{count}.jsonl"), "chats", str(count))
    print("| rows | start | first batch, s | all others, s | peak resident, GiB | own, GiB |")
    print("|---:|---|---:|---:|---:|---:|")
    for _ in range(rounds):
        for count in counts:
            cache = Path(tempfile.mkdtemp(prefix="data-", dir=bench.folder))
            for start in ("first", "second"):
                rows = str(bench.folder / f"{count}.jsonl")
                command = [str(HERE / "inputs.py"), "batches", rows, str(bench.folder / "model")]
                environment = bench.environment | {"HF_HOME": str(cache)}
                started = time.perf_counter()
                process = subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True
                )
                own = _watch_own_memory(process)
                seconds = [float(s) - started for s in (process.stdout or ())]
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                resident = usage.ru_maxrss / 2**20
                print(
                    f"| {count:,} | {start} | {seconds[0]:.1f} | {seconds[1] - seconds[0]:.1f} "
                    f"| {resident:.2f} | {own:.2f} |",
                    flush=True,
                )
            shutil.rmtree(cache)


def _watch_own_memory(process: subprocess.Popen) -> float:
    """Peak GiB that are the process's own: pages of mapped files can be dropped at any time."""
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while found := re.search(r"RssAnon:\s+(\d+)", status.read_text()):
        peak = max(peak, int(found[1]))
        time.sleep(0.05)
    return peak / 2**20


def main() -> None:
    """Make the inputs, then measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "data"])
    parser.add_argument("overrides", nargs="*", help="key=value of our config, for experiments")
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    choices = ["bf16", "fp32"]  # many CPUs emulate bf16, slowly
    parser.add_argument("--dtype", choices=choices, default="bf16", help="of both sides")
    parser.add_argument("--rounds", type=int, help="default: 5 of train, 1 of data")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--project", type=Path, default=TEMPLATE, help="a rendered project")
    options = parser.parse_args()
    device = "cuda" if options.cuda else "cpu"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        bench = Bench(Path(name), options.project, device, options.overrides, options.dtype)
        print_machine(device)
        bench.make("tokenizer", str(bench.folder / "model"))
        if options.what == "data":
            prepare_data(bench, options.rows, options.rounds or 1)
            return
        shape, cases = (LLAMA_8B, CUDA_CASES) if options.cuda else (SMALL, CPU_CASES)
        print("model:", bench.make("model", str(bench.folder / "model"), json.dumps(shape), device))
        for case in {case.kind: case for case in cases}.values():
            bench.make("rows", str(bench.rows(case)), case.kind, str(case.rows))
        results = compare(bench, cases, options.rounds or 5)
        print_table(results, device)
        if options.cuda:
            print_gpu_shares(bench, results)


if __name__ == "__main__":
    main()
