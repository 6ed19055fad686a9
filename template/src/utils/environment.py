"""The project's root, its `.env`, and the environment that libraries read when imported."""

import logging
import os
import sys
import warnings
from pathlib import Path

from src.utils.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def load_environment() -> None:
    """Read `.env` from the project's root into the environment; variables already set win.

    Call it before any library is imported: `HF_HOME` set after `import huggingface_hub` is
    ignored without a warning, and so is `CUDA_VISIBLE_DEVICES` after CUDA has started.

    Raises:
        UserError: `.env` is not UTF-8 text; or the system is not supported.
    """
    if sys.platform not in {"linux", "darwin"}:  # else a folder cannot be synced to the disk
        systems = "Linux, WSL2, or macOS for the offline part"
        raise UserError(f"this system, {sys.platform}, is not supported: use {systems}")
    from dotenv import load_dotenv

    # Not find_dotenv(): it searches from the calling file, or the current folder, upwards.
    path = PROJECT_ROOT / ".env"
    try:
        load_dotenv(path)
    except ValueError as error:  # bytes that are not UTF-8, or a zero byte in a value
        raise UserError(f"{path}: not UTF-8 text ({error}): save it as UTF-8") from None
    os.environ["HF_HOME"] = str(hf_home())  # huggingface_hub takes "" as the current folder
    # The tokenizers' thread pool warns after a fork, in the middle of a progress bar.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Else waiting threads spin: on a busy CPU a tiny model takes three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Fragmentation costs gigabytes when lengths vary; torch's own advice in its OOM message.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # MLflow sends usage statistics by default; an offline first run must not try.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # bitsandbytes warns on import that a CPU kernel of the hub is missing, which is not needed, and
    # in 8 bits at every matmul that inputs are cast to fp16.
    # torchao, which PEFT imports where it is installed, makes torch warn of a deprecated call.
    for library in ("bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Python warns of an escape sequence in a docstring when it first compiles torchao 0.18.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*torchao")


def hf_home() -> Path:
    """Where huggingface_hub caches models, and this project tokens: one setting moves both."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.path.expandvars(home)).expanduser()


def from_root(path: str) -> Path:
    """A path from the config: relative to the project's root wherever the command was typed."""
    return PROJECT_ROOT / os.path.expanduser(path)


def to_root(path: Path) -> str:
    """A path as people would type it: relative to the project's root where it is inside it."""
    return str(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)
