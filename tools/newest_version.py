"""Print the newest version of CHANGELOG.md, or with --notes what it says about it."""

import argparse
import re
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"


def main() -> None:
    """Print one of the two; needs nothing but Python, so that release.yml installs nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notes", action="store_true", help="what CHANGELOG.md says about it")
    entries = re.split(r"^## (\d\S*)\n", CHANGELOG.read_text(), flags=re.MULTILINE)
    print((entries[2].split("\n## ")[0].strip()) if parser.parse_args().notes else entries[1])


if __name__ == "__main__":
    main()
