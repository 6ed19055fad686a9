"""Plan a run's memory before the GPU hour: `uv run scripts/plan.py [CONFIG] [key=value ...]`.

Walks the training step on tensors without data: no GPU, no weights and no download but the model's
config.json. CONFIG and keys are those of scripts/train.py. Further:
  --gpu 24GB       fits or not (a size, or h100, h200, a100, l40s, l4, a10, t4, 4090, 5090); without
                   it the GPU that is here
  --json           one object, with peak_gib and its parts
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from src.utils.environment import load_environment
from src.utils.errors import UserError, run_script
from src.utils.imports import quick_imports

# GiB that a GPU of this name has, a little less than its makers say.
GPUS = {
    **{"b200": 179, "h200": 140, "h100": 79, "a100": 79, "rtx6000": 95, "l40s": 44},
    **{"5090": 31, "4090": 23.5, "3090": 23.5, "l4": 22, "a10": 22, "t4": 14.6, "4080": 15.6},
}


def main(arguments: list[str]) -> None:
    """Read the config first, then import torch."""
    options, rest = _parse(arguments)
    load_environment()
    from src.config import from_command_line

    config, _ = from_command_line(rest)
    total = _size(options.gpu) if options.gpu else None

    with quick_imports():
        import torch

        from src.training.out_of_memory import next_settings
        from src.training.plan import largest_batch, plan
        from src.utils.memory import gpu_memory

    torch.set_num_threads(1)
    total = total or gpu_memory().get("total")
    found = plan(config)
    shown: dict[str, Any] = {name: round(gib, 3) for name, gib in asdict(found).items()}
    if total is not None:
        shown |= {"gpu_gib": total, "fits": found.peak_gib <= total}
        shown["largest_batch_size"] = largest_batch(config, total)
        if not shown["fits"]:
            shown["try"] = next_settings(config)[:3]
    if options.json:
        print(json.dumps(shown))
        return
    for name, value in shown.items():
        if isinstance(value, float) and name != "gpu_gib":
            print(f"{name.removesuffix('_gib'):<12} {value:8.2f} GiB")
    if total is not None:
        verdict = "fits" if shown["fits"] else "does not fit"
        size = f"training.batch_size={shown['largest_batch_size']} is the largest that does"
        print(f"{verdict} in {total:g} GiB; {size if shown['largest_batch_size'] else 'none does'}")
        print(*(f"  try {change}" for change in shown.get("try", [])), sep="\n", end="")
    sys.stdout.flush()


def _size(text: str) -> float:
    """GiB of `24GB`, `24` or `h100`."""
    digits = text.lower().removesuffix("gb").removesuffix("gib").strip()
    try:
        return GPUS[text.lower()] if text.lower() in GPUS else float(digits)
    except ValueError:
        names = ", ".join(GPUS)
        raise UserError(f"--gpu {text}: neither a size such as 24GB nor one of {names}") from None


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="uv run scripts/plan.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--gpu", help="that it should fit")
    parser.add_argument("--json", action="store_true", help="one object")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    run_script(main)
