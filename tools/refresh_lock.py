"""Resolve template/uv.lock.jinja from template/pyproject.toml.jinja, then uv.lock to the same.

    uv run tools/refresh_lock.py            # after a change of the dependencies
    uv run tools/refresh_lock.py --upgrade  # to the newest versions that the dependencies allow

Versions that nothing asks to change stay. Renders again, checks that lock, and prints every
package that changed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from copier import run_copy

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE_LOCK = ROOT / "template/uv.lock.jinja"
ROOT_LOCK = ROOT / "uv.lock"
RESERVED = ROOT / "includes/reserved_names.txt"
VARIABLE = "{{ project_name }}"
PLACEHOLDER = "name-of-the-rendered-project"
# A project of one of these names could be mistaken for a folder of its own.
FOLDERS = {"configs", "data", "outputs", "scripts", "src", "template", "tests"}


def uv_lock(folder: Path, *options: str) -> None:
    """Run `uv lock` without its user's settings: an index or a cut-off date would be recorded."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("UV_") or key == "UV_CACHE_DIR"
    }
    command = ["uv", "lock", "--no-config", *options]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def packages(lock: str) -> dict[str, str]:
    """Map each package that a lock pins to its version."""
    return {
        package["name"]: package["version"]
        for package in tomllib.loads(lock).get("package", [])
        if "registry" in package["source"]
    }


def name_of(block: str) -> str:
    """Return the package that a block of a lock is about."""
    return block.split('"', 2)[1]


def lock_template(*options: str) -> str:
    """Render the working tree and run `uv lock` in it; return the lock."""
    with tempfile.TemporaryDirectory() as folder:
        data = {"project_name": PLACEHOLDER}
        run_copy(str(ROOT), folder, data=data, defaults=True, vcs_ref="HEAD", quiet=True)
        uv_lock(Path(folder), *options)
        return (Path(folder) / "uv.lock").read_text()


def lock_root(template_lock: str, upgrade: bool) -> str:
    """Lock this repository to the template's versions; return the lock as it was."""
    old = ROOT_LOCK.read_text()
    header, *shared = template_lock.rstrip("\n").split("\n\n[[package]]\n")
    names = {name_of(block) for block in shared}
    _, *mine = old.rstrip("\n").split("\n\n[[package]]\n")
    own = [block for block in mine if name_of(block) not in names]
    # uv keeps the versions that it finds in a lock, and its order: the template's packages and
    # what only this repository needs, as uv itself would write them.
    kept = [block for block in shared if name_of(block) != PLACEHOLDER] + own
    seed = [header, *sorted(kept, key=name_of)]
    ROOT_LOCK.write_text("\n\n[[package]]\n".join(seed) + "\n")
    uv_lock(ROOT, *(f"--upgrade-package={name_of(block)}" for block in own if upgrade))
    return old


def report(path: Path, old: str) -> None:
    """Print what changed in a lock."""
    before, now = packages(old), packages(path.read_text())
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    print(f"{path.relative_to(ROOT)}: {len(now)} packages, {len(changed)} changed")
    for name in changed:
        print(f"  {name} {before.get(name, '-')} -> {now.get(name, '-')}")


def main() -> None:
    """Refresh both locks and the names that a project may not have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest allowed versions")
    upgrade = parser.parse_args().upgrade

    old_template = TEMPLATE_LOCK.read_text()
    new_template = lock_template(*["--upgrade"] * upgrade)
    if new_template.count(f'"{PLACEHOLDER}"') != 1:
        sys.exit("the lock should name the project exactly once")
    if any(mark in new_template for mark in ("{{", "{%", "{#")):
        sys.exit("the lock contains what Jinja would read as its own")
    TEMPLATE_LOCK.write_text(new_template.replace(f'"{PLACEHOLDER}"', f'"{VARIABLE}"'))
    lock_template("--check", "--offline")  # what a new project will get
    old_root = lock_root(new_template, upgrade)

    modules = {name.replace("_", "-") for name in sys.stdlib_module_names if name[0] != "_"}
    reserved = set(packages(new_template)) | modules | FOLDERS
    RESERVED.write_text("\n".join(sorted(reserved)) + "\n")

    report(TEMPLATE_LOCK, old_template)
    report(ROOT_LOCK, old_root)


if __name__ == "__main__":
    main()
