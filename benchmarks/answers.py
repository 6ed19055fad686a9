"""Answers a second by batch, and the memory of answering a large file and of an export.

    uv run --group benchmark benchmarks/answers.py

A Llama of 30 million random weights on a CPU, 64 new tokens an answer (it never stops by itself).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "template"
ROUNDS, NEW = 3, 64
PROMPTS = ["Tell me about " + "very " * (n % 9) + "small models." for n in range(16)]


def main() -> None:
    """Print what README.md's goals are about."""
    sys.path.insert(0, str(TEMPLATE))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make(folder / "model", layers=8, hidden=512)
        print(f"batch     16 prompts together are {batched(folder / 'model'):.1f} x as fast\n")
        for rows in (1_000, 100_000):
            print(f"file      {rows:,} rows: peak {file_of(folder, rows):.2f} GiB")
        size = make(folder / "large", layers=12, hidden=1536)
        took = export(folder)
        print(
            f"\nexport    of {size:.2f} GiB: {took:.2f} GiB above the imports, {took / size:.2f} x"
        )


def make(folder: Path, layers: int, hidden: int) -> float:
    """Save a random model; return its weights' GiB."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TEMPLATE / "configs/tiny")
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters()) / 2**30


def batched(folder: Path) -> float:
    """How many times faster 16 prompts are together than one after another: new tokens alike."""
    import torch

    from src.models.generation import generate
    from src.trained import find_trained, load_trained

    torch.set_num_threads(2)
    model, tokenizer = load_trained(find_trained(str(folder)), torch.device("cpu"))
    model.generation_config.min_new_tokens = NEW  # so that both make as many
    ratios = []
    for _ in range(ROUNDS):
        seconds = {}
        for size in (1, 16):
            began = time.perf_counter()
            generate(model, tokenizer, PROMPTS, NEW, batch_size=size)
            seconds[size] = time.perf_counter() - began
        ratios.append(seconds[1] / seconds[16])
    return statistics.median(ratios)


def file_of(folder: Path, rows: int) -> float:
    """Peak resident GiB of the loop over a file, with a model that answers at once."""
    source = folder / f"{rows}.jsonl"
    with source.open("w") as file:
        for n in range(rows):
            file.write(json.dumps({"prompt": f"row {n} " + "word " * 100}) + "\n")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from src.config import DataConfig\n"
        "from src.data.answers import answer_rows, check_answers\n"
        "file = sys.argv[1], Path(sys.argv[2]), DataConfig(train='-'), 'nobody'\n"
        "done, total = check_answers(*file)\n"
        "answer_rows(*file, done, total, lambda asked: ['answer ' * 100 for _ in asked])\n"
        "check_answers(*file)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    return float(peak(code, source, folder / f"{rows}.out"))


def export(folder: Path) -> float:
    """Peak resident GiB of a merge, above what the imports take."""
    code = (
        "import resource, sys, peft, torch; from pathlib import Path\n"
        "from src.tools.export import export\n"
        "from src.models.adapters import add_adapters\n"
        "from src.trained import find_trained\n"
        "folder, out = Path(sys.argv[1]), Path(sys.argv[2]); out.mkdir()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20\n"
        "before = peak()\n"
        "export(find_trained(str(folder)), out)\n"
        "print(peak() - before)"
    )
    adapter(folder)
    return float(peak(code, folder / "adapter", folder / "out"))


def adapter(folder: Path) -> None:
    """A run's `final/` with adapters on the large model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from src.config import LoraConfig
    from src.models.adapters import add_adapters
    from src.utils.files import RECIPE

    model = add_adapters(AutoModelForCausalLM.from_pretrained(folder / "large"), LoraConfig())
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    AutoTokenizer.from_pretrained(folder / "large").save_pretrained(folder / "adapter")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (folder / "adapter" / RECIPE).write_text(
        f"output_dir: x\nmodel: {{name: {folder / 'large'}}}\n"
        f"data: {{train: {folder}/rows.jsonl}}\n"
    )


def peak(code: str, *arguments: Path) -> str:
    """What a fresh Python prints last."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, cwd=TEMPLATE, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
