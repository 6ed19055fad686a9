"""Where tokens are kept: in folders named by a hash of all that they were made from.

Standard library only: `src.preflight` asks before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from src.data.rows import is_file, load_hub
from src.utils.environment import from_root

# Who edits these makes other tokens, or other complaints: part of the hash, so that nobody has to
# remember to empty a cache.
CODE = ("rows.py", "encoding.py", "dataset.py")


def token_folder(source: str, limit: int | None, *made_with: object) -> Path:
    """The folder for a source's tokens, whether they were made already or not.

    Args:
        source: `data.train` or `data.eval`.
        limit: the first so many rows only.
        made_with: whatever else changes the tokens.
    """
    settings = hashlib.sha256(repr(made_with).encode()).hexdigest()[:16]
    part = f"first-{limit}-" if limit else ""
    return _root() / f"{part}{_hash(source)}-{settings}"


def was_tokenised(source: str) -> bool:
    """Whether an earlier run read all rows of a local file as it is now, and found them good."""
    try:
        return is_file(source) and any(_root().glob(f"{_hash(source)}-*"))
    except OSError:  # missing, a folder, unreadable: for check_source to say
        return False


def _root() -> Path:
    # As huggingface_hub finds it, so that one setting moves all caches to a large disk.
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "tokens"


def _hash(source: str) -> str:
    digest = hashlib.sha256()
    for name in CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    if is_file(source):
        path = from_root(source)
        digest.update(path.suffix.encode())  # which decides how the bytes are read
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update(load_hub(source)._fingerprint.encode())
    return digest.hexdigest()[:32]
