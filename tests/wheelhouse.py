"""A folder of empty wheels, so that `uv add` and `uv lock` resolve without a network or a cache."""

import tomllib
import zipfile
from pathlib import Path
from typing import Any


def build(lock: Path, folder: Path) -> dict[str, str]:
    """Make a wheel without code for every package of a lock; return the settings that use them."""
    folder.mkdir()
    for package in tomllib.loads(lock.read_text())["package"]:
        if "registry" in package["source"]:
            extras = package.get("optional-dependencies", {})
            add(folder, package["name"], package["version"], package.get("dependencies"), extras)
    cache = folder.with_name(f"{folder.name}-cache")
    settings = {"UV_FIND_LINKS": folder, "UV_CACHE_DIR": cache, "UV_NO_INDEX": 1, "UV_OFFLINE": 1}
    return {name: str(value) for name, value in settings.items()}


def add(
    folder: Path,
    name: str,
    version: str,
    requires: list[dict[str, Any]] | None = None,
    extras: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Make one wheel that says what a lock says about the package."""
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.3", f"Name: {name}", f"Version: {version}"]
    lines += [requirement(each) for each in requires or []]
    for extra, each_requires in (extras or {}).items():
        lines += [f"Provides-Extra: {extra}", *(requirement(r, extra) for r in each_requires)]
    kind = ["Wheel-Version: 1.0", "Generator: test", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file, content in (("METADATA", lines), ("WHEEL", kind), ("RECORD", [])):
            wheel.writestr(f"{stem}.dist-info/{file}", "\n".join(content) + "\n")


def requirement(locked: dict[str, Any], extra: str | None = None) -> str:
    """Turn what a lock says about a dependency into a line of metadata."""
    markers = [f"({locked['marker']})"] if "marker" in locked else []
    markers += [f"extra == '{extra}'"] if extra else []
    extras = f"[{','.join(locked['extra'])}]" if "extra" in locked else ""
    version = f"=={locked['version']}" if "version" in locked else ""
    condition = f" ; {' and '.join(markers)}" if markers else ""
    return f"Requires-Dist: {locked['name']}{extras}{version}{condition}"
