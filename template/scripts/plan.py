"""Plan a run before you pay for a GPU.

Runs the training step on tensors without data. It needs no GPU and no weights, only the model's
config.json; for steps, tokens and hours also its tokenizer and the rows. CONFIG and keys are those
of scripts/train.py (default: configs/train.yaml).
"""

from src.config import Config, from_command_line
from src.trained import make_parser
from src.utils.script import run_script

# GiB that a GPU of this name has, a little less than its makers say, and its dense bf16 TFLOP/s.
GPUS = {
    "b200": (179, 2250), "h200": (140, 989), "h100": (79, 989), "a100": (79, 312),
    "l40s": (44, 362), "5090": (31, 210), "4090": (23.5, 165), "3090": (23.5, 71),
    "l4": (22, 121), "a10": (22, 125), "4080": (15.6, 97), "t4": (14.6, 65),
}  # fmt: skip
UTILISATION = 0.4  # share of that speed which training uses


def main(arguments: list[str]) -> None:
    """Read the config first, then import torch."""
    parser = make_parser(__doc__)
    parser.usage = "%(prog)s [CONFIG] [key=value ...] [--gpu GPU]"
    sizes = f"24GB, or one of {', '.join(GPUS)} (default: the GPU of this machine)"
    text = f"the GPU to plan for: its memory, such as {sizes}"
    parser.add_argument("--gpu", type=size_of_gpu, default=(None, None), help=text)
    options, rest = parser.parse_known_args(arguments)
    config = from_command_line(rest)
    total, tflops = options.gpu

    import torch

    from src.training.speed import matmul_rate
    from src.utils.memory import gpu_memory

    torch.set_num_threads(1)
    if total is None and torch.cuda.is_available():
        total = gpu_memory()["total"]
        tflops = matmul_rate(torch.device("cuda"), torch.bfloat16) / 1e12
    _print_memory(config, float("inf") if total is None else total)
    _print_cost(config, tflops)


def size_of_gpu(text: str) -> tuple[float, float | None]:
    """GiB and TFLOP/s of `24GB`, `24` or `h100`; of a size alone the speed is not known."""
    name = text.lower()
    if name in GPUS:
        return GPUS[name]
    if not 1 <= (gib := float(name.removesuffix("gb"))) < 10_000:  # nan is not
        raise ValueError
    return gib, None


def _print_memory(config: Config, total: float) -> None:
    """Print the peak and its parts, what `auto` means for it, and whether it fits."""
    from src.training.plan import cheapest_that_fits, largest_batch, plan_for

    settled, planned = plan_for(config, total)
    for part, gib in vars(planned).items():
        print(f"{part.removesuffix('_gib'):<12} {gib:8.2f} GiB")
    if config.model.gradient_checkpointing == "auto":
        recomputed = "no layer" if settled == config else "every layer"
        print(f"planned with {recomputed} recomputed; training recomputes as few as needed")
    if config.model.compile is not False:
        print("compiled layers take less (8B LoRA: 40 instead of 62 GiB): an upper bound")
    if total == float("inf"):
        return
    fits, size = planned.peak_gib <= total, largest_batch(config, total) or "none"
    verdict = "fits" if fits else "does not fit"
    print(f"{verdict} in {total:g} GiB; the largest training.batch_size that does: {size}")
    if not fits and (change := cheapest_that_fits(settled, total)):
        print(f"try {change[0]}: {change[1]:.2f} GiB, as planned with it")


def _print_cost(config: Config, tflops: float | None) -> None:
    """Print the steps and tokens of the run, and its hours where the GPU's speed is known."""
    from src.data.dataset import load_documents
    from src.models.model import load_tokenizer
    from src.training.plan import cost

    train, _ = load_documents(config, load_tokenizer(config.model))
    steps, tokens, flops = cost(config, train)
    print(f"{steps:,} steps, {tokens:,} tokens")
    if tflops:
        hours = flops / (tflops * 1e12 * UTILISATION) / 3600
        print(f"{hours:.3g} hours at {UTILISATION:.0%} of {tflops:,.0f} TFLOP/s")


if __name__ == "__main__":
    run_script(main)
