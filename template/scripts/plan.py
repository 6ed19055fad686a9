"""Plan a run before the GPU hour: `uv run scripts/plan.py [CONFIG] [key=value ...]`.

Walks the training step on tensors without data: no GPU and no weights, but the model's config.json,
and where its tokenizer is at hand the rows too, for steps, tokens and hours. CONFIG and keys are
those of scripts/train.py. Further:
  --gpu 24GB       fits or not, and what would: a size, or h100, h200, a100, l40s, l4, a10, t4, 4090
                   and others; without it the GPU that is here
  --mfu 0.4        the share of that GPU's peak that the hours are for
  --json           one object, with peak_gib and its parts
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

from src.utils.environment import load_environment
from src.utils.errors import UserError, run_script
from src.utils.imports import quick_imports

# GiB that a GPU of this name has, a little less than its makers say, and its dense bf16 TFLOP/s.
GPUS = {
    "b200": (179, 2250), "h200": (140, 989), "h100": (79, 989), "a100": (79, 312),
    "l40s": (44, 362), "5090": (31, 210), "4090": (23.5, 165), "3090": (23.5, 71),
    "l4": (22, 121), "a10": (22, 125), "4080": (15.6, 97), "t4": (14.6, 65),
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Read the config first, then import torch."""
    options, rest = _parse(arguments)
    load_environment()
    from src.config import changed, from_command_line

    config, _ = from_command_line(rest)
    total, peak = _size(options.gpu) if options.gpu else (None, None)

    with quick_imports():
        import torch

        from src.training.plan import cheapest_that_fits, largest_batch, plan
        from src.training.speed import matmul_rate
        from src.utils.memory import gpu_memory

    torch.set_num_threads(1)
    if total is None and torch.cuda.is_available():
        total = gpu_memory()["total"]
        peak = matmul_rate(torch.device("cuda"), torch.bfloat16) / 1e12
    found, least = plan(config), config
    if config.model.gradient_checkpointing == "auto":
        least = changed(config, "model.gradient_checkpointing=true")
    recomputing = least != config and total is not None and found.peak_gib > total
    if recomputing:
        found = plan(least)
    shown: dict[str, Any] = {name: round(gib, 3) for name, gib in asdict(found).items()}
    if total is not None:
        shown |= {"gpu_gib": total, "fits": found.peak_gib <= total}
        asked = config.training.batch_size if shown["fits"] else 0  # more than is tried, perhaps
        shown["largest_batch_size"] = max(asked, largest_batch(least, total))
        if not shown["fits"] and (change := cheapest_that_fits(least, total)):
            shown["try"], shown["peak_gib_then"] = change[0], round(change[1], 3)
    if recomputing:
        shown["recomputed"] = "every layer; training recomputes no more than it needs (auto)"
    shown |= _cost(config, peak, options.mfu)
    print(json.dumps(shown) if options.json else _as_text(shown))


def _cost(config: Any, peak: float | None, share: float) -> dict[str, Any]:
    """Steps, tokens and hours of the run, or why they are not known."""
    from src.data.dataset import load_documents
    from src.models.model import load_tokenizer
    from src.training.plan import cost

    try:
        train, _ = load_documents(config, load_tokenizer(config.model))
    except UserError as error:
        return {"not_counted": error.problems[0]}
    run = cost(config, train)
    found: dict[str, Any] = {"steps": run.steps, "tokens": run.tokens}
    if peak is not None:
        hours = run.hours(peak * 1e12, share)
        found |= {"mfu": share, "peak_tflops": round(peak), "hours": float(f"{hours:.3g}")}
    return found


def _as_text(shown: dict[str, Any]) -> str:
    from src.training.plan import MOST_ROWS

    parts = ("weights", "gradients", "moments", "activations", "overhead", "peak_gib")
    lines = [f"{part.removesuffix('_gib'):<12} {shown[part]:8.2f} GiB" for part in parts]
    if "fits" in shown:
        verdict = "fits" if shown["fits"] else "does not fit"
        most = " or more" * (shown["largest_batch_size"] >= MOST_ROWS)
        size = f"training.batch_size={shown['largest_batch_size']}{most} is the largest that does"
        size = size if shown["largest_batch_size"] else "no training.batch_size does"
        lines.append(f"{verdict} in {shown['gpu_gib']:g} GiB; {size}")
    if "recomputed" in shown:
        lines.append(f"recomputed   {shown['recomputed']}")
    if "try" in shown:
        lines.append(f"try {shown['try']}: {shown['peak_gib_then']:.2f} GiB, as planned with it")
    if "not_counted" in shown:
        lines.append(f"steps and hours are not known: {shown['not_counted']}")
    else:
        lines.append(f"{shown['steps']:,} steps, {shown['tokens']:,} tokens")
    if "hours" in shown:
        used = f"{shown['mfu']:.0%} of {shown['peak_tflops']:,} TFLOP/s"
        time = f"{shown['hours']:,} hours" if shown["hours"] >= 0.02 else "about a minute or less"
        lines[-1] += f"; {time} at {used}"
    return "\n".join(lines)


def _size(text: str) -> tuple[float, float | None]:
    """GiB and TFLOP/s of `24GB`, `24` or `h100`; of a size alone the speed is not known."""
    digits = text.lower().removesuffix("gb").removesuffix("gib").strip()
    try:
        return GPUS[text.lower()] if text.lower() in GPUS else (float(digits), None)
    except ValueError:
        names = ", ".join(GPUS)
        raise UserError(f"--gpu {text}: neither a size such as 24GB nor one of {names}") from None


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="uv run scripts/plan.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--gpu", help="that it should fit")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its peak that is used")
    parser.add_argument("--json", action="store_true", help="one object")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    run_script(main)
