"""The tests of `in_project/` pass in a rendered project, whose owner does not get them.

They guard what the template promises and an owner seldom edits: kills, several processes, plans,
places that cannot be written, damaged folders, MLflow's failures.
"""

import shutil
import sys
from pathlib import Path

from helpers import render, run

FOLDER = Path(__file__).with_name("in_project")


def test_a_rendered_project_passes_the_tests_that_its_owner_does_not_get(tmp_path: Path) -> None:
    project = render(tmp_path / "project")
    shutil.copytree(FOLDER, project / "tests", dirs_exist_ok=True)
    tests = [f"tests/{file.name}" for file in FOLDER.glob("test_*.py")]
    words = ("pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *tests)
    # More of the random kills than anybody waits for by hand.
    run(sys.executable, "-m", *words, cwd=project, PYTHONPATH=str(project), KILLS="50")
