"""Name the next release in CHANGELOG.md, and record what it promises to its projects.

    uv run tools/release.py 0.2.0

Merge the result: release.yml tags the commit when main is green. Until it is tagged, the command
may be repeated for the same version.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from copier import run_copy
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = ROOT / "CHANGELOG.md"
PROMISES = ROOT / "tests/last_release.json"
RELEASES = ROOT / "tests/releases.txt"
UNRELEASED = "## Unreleased\n"
RESOLVE = """
import json, sys
from src.config import load_config
print(json.dumps(load_config(sys.argv[1]).written))
"""


def promises(root: Path = ROOT) -> dict[str, Any]:
    """Return what projects rely on: questions, choices, paths, a configuration's meaning."""
    settings = yaml.safe_load((root / "copier.yml").read_text())
    questions = {
        name: sorted(choices.values() if isinstance(choices, dict) else choices)
        for name, question in settings.items()
        if not name.startswith("_")
        for choices in [question.get("choices", [])]
    }
    paths = set()
    with tempfile.TemporaryDirectory() as folder:
        for ci in questions["ci"]:
            project = Path(folder, ci)
            run_copy(str(root), project, {"ci": ci}, defaults=True, vcs_ref="HEAD", quiet=True)
            found = (path for path in project.rglob("*") if path.is_file())
            paths |= {path.relative_to(project).as_posix() for path in found}
        configuration = (project / "configs/train.yaml").read_text()
        values = resolve(project / "configs/train.yaml", root / "template")
    return {
        "questions": questions,
        "files": sorted(paths),
        "configuration": configuration,
        "values": values,
    }


def resolve(configuration: Path, template: Path) -> dict[str, Any]:
    """Load a configuration with a template's code; return the value of every key."""
    command = [sys.executable, "-c", RESOLVE, configuration]
    done = subprocess.run(command, cwd=template, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def versions(changelog: str) -> list[str]:
    """Return the versions that a changelog has an entry for, newest first."""
    return re.findall(r"^## (\d\S*)$", changelog, re.MULTILINE)


def entry(changelog: str, version: str) -> str:
    """Return what a changelog says about a version."""
    return changelog.split(f"## {version}\n", 1)[1].split("\n## ", 1)[0].strip()


def main() -> None:
    """Rename the heading, record the promises, and append the tag to the releases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="as PEP 440 writes it, such as 0.2.0")
    version = str(Version(parser.parse_args().version))
    changelog = CHANGELOG.read_text()
    tags = subprocess.check_output(["git", "tag"], cwd=ROOT, text=True).split()
    if version in tags:
        sys.exit(f"{version} is tagged already: a tag is never moved")
    others = [Version(other) for other in versions(changelog) if other != version]
    if any(Version(version) <= other for other in others):
        sys.exit(f"{version} does not follow {max(others)}")
    if f"## {version}\n" not in changelog:
        if not entry(changelog, "Unreleased"):
            sys.exit("CHANGELOG.md says nothing under its heading Unreleased")
        CHANGELOG.write_text(changelog.replace(UNRELEASED, f"## {version}\n", 1))
    recorded = {"version": version} | promises()
    PROMISES.write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n")
    lines = RELEASES.read_text().splitlines()
    RELEASES.write_text("\n".join([*(line for line in lines if line != version), version]) + "\n")
    print(
        f"CHANGELOG.md, {PROMISES.name} and {RELEASES.name} name {version}: commit and merge them"
    )


if __name__ == "__main__":
    main()
