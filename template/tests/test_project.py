"""The project as a whole: what an update or a careless commit could break."""

import re
import subprocess

from conftest import ROOT


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:  # not a git repository: all that is not hidden or generated
        paths = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
        return [str(p) for p in paths if p.parts[0] not in {".venv", "outputs", "mlruns", ".git"}]
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def test_no_conflict_of_an_update_is_left() -> None:
    """`copier update` exits 0 with conflicts: this is where they are noticed."""
    marker = re.compile(rb"^(<{7} |={7}\r?$|>{7} )", re.MULTILINE)
    files = tracked_files()
    assert not [name for name in files if name.endswith(".rej")]
    conflicted = [
        name for name in files if len(set(marker.findall((ROOT / name).read_bytes()))) > 1
    ]
    assert not conflicted, "settle these, then `uv lock` if uv.lock is among them"


def test_secrets_and_results_are_not_committed() -> None:
    listed = tracked_files()
    assert ".env" not in listed
    assert not [name for name in listed if name.startswith(("outputs/", "mlruns/"))]
