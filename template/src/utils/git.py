"""Ask git about the project, where there is git."""

import subprocess
from contextlib import suppress
from pathlib import Path


def git(root: Path, *words: str) -> str | None:
    """What a git command prints in a folder; None where it fails, or there is no git."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", *words], cwd=root, check=True, capture_output=True, text=True, timeout=20
        )
        return done.stdout.strip()
    return None
