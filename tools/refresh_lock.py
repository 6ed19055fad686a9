"""Resolve template/uv.lock.jinja again from template/pyproject.toml.jinja, then uv.lock from it.

    uv run tools/refresh_lock.py            # after a change of the dependencies
    uv run tools/refresh_lock.py --upgrade  # to the newest versions that the dependencies allow

Prints every package whose version changed. The versions that nothing asks to change stay.
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
PLACEHOLDER = "name-of-the-rendered-project"
NAME_LINE = 'name = "{{ project_name }}"\n'
# The folders of a rendered project: a package of the same name would shadow them or be shadowed.
FOLDERS = {"src", "tests", "scripts", "configs", "data", "outputs", "template"}


def uv_lock(folder: Path, *options: str) -> None:
    """Run `uv lock`, deaf to the settings of whoever runs it: they would be written into the lock."""
    settings = {"UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"}
    settings |= {"UV_EXCLUDE_NEWER", "UV_RESOLUTION", "UV_PRERELEASE", "UV_CONSTRAINT", "UV_OVERRIDE"}
    environment = {key: value for key, value in os.environ.items() if key not in settings}
    command = ["uv", "lock", "--no-config", *options]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def versions(lock: str) -> dict[str, str]:
    packages = tomllib.loads(lock)["package"]
    return {p["name"]: p["version"] for p in packages if "version" in p and p["name"] != PLACEHOLDER}


def blocks(lock: str) -> dict[str, str]:
    """The `[[package]]` blocks of a lock by package name."""
    _, *found = lock.split("[[package]]\n")
    return {block.split('"', 2)[1]: "[[package]]\n" + block for block in found}


def resolve_template(options: list[str]) -> str:
    """Lock a render of the working tree; return the lock under the placeholder's name."""
    with tempfile.TemporaryDirectory() as folder:
        data = {"project_name": PLACEHOLDER}
        run_copy(str(ROOT), folder, data=data, defaults=True, vcs_ref="HEAD", quiet=True)
        uv_lock(Path(folder), *options)
        return (Path(folder) / "uv.lock").read_text()


def resolve_root(template_lock: str, options: list[str]) -> str:
    """Lock this repository to the template's versions, and what only it needs to its own."""
    old = ROOT_LOCK.read_text() if ROOT_LOCK.exists() else ""
    shared = blocks(template_lock)
    own = [block for name, block in blocks(old).items() if name not in shared]
    upgrades = [f"--upgrade-package={name}" for name in blocks(old) if options and name not in shared]
    ROOT_LOCK.write_text(template_lock.rstrip("\n") + "\n\n" + "\n".join(own))
    uv_lock(ROOT, *upgrades)
    return old


def report(title: str, old: dict[str, str], new: dict[str, str]) -> None:
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    print(f"{title}: {len(new)} packages, {len(changed)} changed")
    for name in changed:
        print(f"  {name} {old.get(name, '-')} -> {new.get(name, '-')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest allowed versions")
    options = ["--upgrade"] if parser.parse_args().upgrade else []

    old_template = TEMPLATE_LOCK.read_text().replace("{{ project_name }}", PLACEHOLDER)
    new_template = resolve_template(options)
    name_line = f'name = "{PLACEHOLDER}"\n'
    if new_template.count(name_line) != 1:
        sys.exit(f"the lock should name the project once, not {new_template.count(name_line)} times")
    if any(mark in new_template for mark in ("{{", "{%", "{#")):
        sys.exit("the lock contains what Jinja would read as its own")
    TEMPLATE_LOCK.write_text(new_template.replace(name_line, NAME_LINE))

    old_root = resolve_root(new_template, options)
    modules = {name.replace("_", "-") for name in sys.stdlib_module_names if name[0] != "_"}
    reserved = sorted(set(versions(new_template)) | modules | FOLDERS)
    RESERVED.write_text("\n".join(reserved) + "\n")

    report("template/uv.lock.jinja", versions(old_template), versions(new_template))
    report("uv.lock", versions(old_root) if old_root else {}, versions(ROOT_LOCK.read_text()))


if __name__ == "__main__":
    main()
