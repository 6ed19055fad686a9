"""What tracking costs a step: each state of MLflow's server against tracking switched off.

    uv run benchmarks/tracking.py

The smoke run and one with a quarter of its tokens, logged at each of their short steps, which is
harder than any real run. Each is a process with one thread, as Python has on a GPU; the sides
alternate. A server that is "down" refuses, one that "hangs" takes what is sent and is silent.
"""

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "template"
ROUNDS, STEPS, WARM = 3, 300, 20
SIZES = {"a quarter": ("training.batch_size=1",), "smoke": ()}


def main() -> None:
    """Print the step of each side, and the whole run's time after its first steps."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as silent:
        folder = Path(name)
        port = _free()
        uris = {
            "off": None,
            "mlflow.db": f"sqlite:///{folder / 'mlflow.db'}",
            "server": f"http://127.0.0.1:{port}",
            "down": "http://127.0.0.1:9",
            "hangs": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        server = _serve(folder, port)
        try:
            for size, words in SIZES.items():
                _table(folder, size, words, uris)
        finally:
            server.terminate()


def _table(folder: Path, size: str, words: tuple[str, ...], uris: dict[str, str | None]) -> None:
    rounds = [
        {side: _run(folder / f"{size}-{n}-{side}", words, uri) for side, uri in uris.items()}
        for n in range(ROUNDS)
    ]
    print(f"\n| {size} | step, ms | of off's (min-max) | all steps, s | start to end, s |")
    print("|---|---:|---:|---:|---:|")
    for side in uris:
        step, steps, whole = (statistics.median(each[side][n] for each in rounds) for n in range(3))
        ratios = [each[side][0] / each["off"][0] for each in rounds]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        ratio = f"{middle:.3f} ({low:.3f}-{high:.3f})"
        print(f"| {side} | {step * 1e3:.2f} | {ratio} | {steps:.2f} | {whole:.1f} |", flush=True)


def _run(output: Path, words: tuple[str, ...], uri: str | None) -> tuple[float, float, float]:
    """A step (the mean of the middle 80 %: times are kept in ms), all of them, the process."""
    command = [
        sys.executable, "scripts/train.py", "configs/smoke.yaml", f"output_dir={output}", *words,
        "device=cpu", f"training.max_steps={STEPS}", "training.log_every=1", "data.eval=null",
        f"tracking.enabled={str(uri is not None).lower()}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MLFLOW_TRACKING_URI": uri} if uri else {}
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    times = [line["time"] for line in lines if "loss" in line][WARM:]
    steps = sorted(after - before for before, after in itertools.pairwise(times))
    tenth = len(steps) // 10
    return statistics.mean(steps[tenth:-tenth]), times[-1] - times[0], whole


def _serve(folder: Path, port: int) -> subprocess.Popen:
    store = f"sqlite:///{folder / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(120):
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return server
        time.sleep(0.5)
    raise RuntimeError("the server did not start")


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


if __name__ == "__main__":
    main()
