"""Step time and bytes on the wire for 1, 2 and 4 processes: DDP and FSDP2 against one flat sum.

    uv run --group benchmark benchmarks/processes.py

All processes share one machine's cores, so that a step of four takes longer than one of one:
what is compared are the strategies at the same number. Bytes are what the loopback device counted.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, STEPS, WARM = 3, 8, 3
SIZE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "vocab_size": 512,
}
TOKENS = 128


def main() -> None:
    """Start each strategy in turn, several rounds; print a table."""
    print("| processes | strategy | step, ms (median; rounds) | bytes a step | in theory |")
    print("|---:|---|---:|---:|---:|")
    for processes in (1, 2, 4):
        names = ["one"] if processes == 1 else ["flat", "ddp", "fsdp"]
        rounds = [{name: measure(name, processes) for name in names} for _ in range(ROUNDS)]
        for name in names:
            found = [each[name] for each in rounds]
            times = [each["seconds"] * 1e3 for each in found]
            low, high = min(times), max(times)
            sent = statistics.median(each["bytes"] for each in found) / 1e6
            theory = in_theory(name, processes, found[0]["parameters"]) / 1e6
            print(
                f"| {processes} | {name} | {statistics.median(times):.0f} ({low:.0f}-{high:.0f}) "
                f"| {sent:.1f} MB | {theory:.1f} MB |"
            )


def in_theory(name: str, processes: int, parameters: int) -> float:
    """Bytes that all processes send: a ring passes (W - 1) / W of what it gathers or scatters."""
    once = 4 * parameters * (processes - 1)  # fp32, by all W processes together
    # A sum is a reduce-scatter and an all-gather; FSDP gathers twice and scatters once.
    return {"one": 0, "flat": 2, "ddp": 2, "fsdp": 3}[name] * once


def measure(name: str, processes: int) -> dict:
    """One start of torchrun; what its main process measured."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", __file__, name], check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "template")},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str) -> None:
    """What each process does."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.data.batching import short_row, to_device, with_targets
    from src.models.attention import set_attention
    from src.models.head import find_plain_head
    from src.training import strategy
    from src.training.loss import Objective
    from src.utils.distributed import all_sum, is_main, process_group
    from src.utils.ranks import WORLD_SIZE

    cpu, dtype = torch.device("cpu"), torch.float32

    def build(device: torch.device) -> Any:
        with device:
            return LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True, use_cache=False))

    with process_group(cpu, 600):
        shards = WORLD_SIZE if name == "fsdp" else 1
        flat = Objective(build(cpu), dtype) if name == "flat" else None
        objective = flat or strategy.distribute(build, shards, cpu, dtype)
        strategy.run_on_model(objective, set_attention, "auto", True, dtype)
        bare = strategy.unwrapped(objective)
        bare.head = strategy.run_on_model(objective, find_plain_head, dtype)
        parameters: list[Any] = [p for p in objective.parameters() if p.requires_grad]
        batch = to_device(with_targets(short_row(3, TOKENS)), cpu)
        seconds, sent = [], []
        for step in range(WARM + STEPS):
            all_sum(0)
            began, before = time.perf_counter(), loopback()
            objective(batch).backward()
            if name == "flat":
                flat = torch.cat([p.grad.flatten() for p in parameters])
                dist.all_reduce(flat)
                parts = flat.split([p.numel() for p in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.grad.copy_(part.view_as(parameter))
            all_sum(0)
            if step >= WARM:
                seconds.append(time.perf_counter() - began)
                sent.append(loopback() - before)
            for parameter in parameters:
                parameter.grad = None
        count = sum(p.numel() for p in parameters)
        found = {"seconds": statistics.median(seconds), "bytes": statistics.median(sent)}
        if is_main():
            print(json.dumps({**found, "parameters": count}))


def loopback() -> int:
    """Bytes that this machine has sent to itself."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    work(sys.argv[1]) if len(sys.argv) > 1 else main()
