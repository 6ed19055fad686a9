r"""Train as a config says: `uv run scripts/train.py [CONFIG] [key=value ...]`.

CONFIG is a YAML file, configs/train.yaml if none is given. Overrides are its keys with dots:
  uv run scripts/train.py configs/smoke.yaml                         a minute on any CPU
  uv run scripts/train.py training.learning_rate=1e-4 lora.r=32      the real run, changed
  uv run scripts/train.py lora=null model.quantization=none training.learning_rate=2e-5 \
      training.optimizer=adamw8bit                                   full fine-tuning
  uv run scripts/train.py training.resume=auto                       go on where it stopped
  torchrun --nproc-per-node=8 scripts/train.py                       on eight GPUs
All keys, their defaults and why: src/config.py
"""

import os
import sys

from src.utils.ranks import RESTARTS
from src.utils.script import quick_imports, run_script


def main(arguments: list[str]) -> None:
    """Everything cheap first: torch is imported when nothing is left to complain about."""
    from src.config import from_command_line
    from src.preflight import check_run

    config = from_command_line(arguments)
    if RESTARTS and config.training.resume == "never":  # torchrun --max-restarts
        config = from_command_line([*arguments, "training.resume=auto"])
    check_run(config)
    if config.deterministic:
        # cuBLAS needs it for equal bits, and reads it when CUDA starts, which importing torch can
        # do: its check for Triton asks for the GPU's properties.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if sys.stderr.isatty():
        print("loading torch …", end="\r", file=sys.stderr, flush=True)

    with quick_imports():
        from src.training.run import run

    run(config)


if __name__ == "__main__":
    run_script(main, __doc__)
