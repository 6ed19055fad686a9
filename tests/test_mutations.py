"""The tests that guard the worst mistakes fail when the mistake is made."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import run, snapshot


def bump_a_dependency_in_the_project_alone(template: Path) -> None:
    replace(template / "pyproject.toml.jinja", '"torch>=', '"torch>=0.')


def render_a_file_of_secrets(template: Path) -> None:
    # A plain `.env` or `.env.jinja` cannot even be committed: template/.gitignore holds here, too.
    (template / "{% if ci != 'none' %}.env{% endif %}.jinja").write_text("HF_TOKEN=\n")


def ignore_a_folder_of_sources(template: Path) -> None:
    (template / ".gitignore").open("a").write("data/\n")


def rename_a_file(template: Path) -> None:
    (template / "src/utils/seed.py").rename(template / "src/utils/luck.py")


def put_an_answer_into_python(template: Path) -> None:
    (template / "src/utils/seed.py").open("a").write("NAME = '{{ project_name }}'\n")


def hand_the_kernel_what_autocast_left(template: Path) -> None:
    cast = "query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)"
    replace(template / "src/models/attention.py", cast, "pass")


def wait_for_the_gpu_within_a_step(template: Path) -> None:
    replace(template / "src/training/trainer.py", "loss += share.detach()", "loss += share.item()")


def leave_a_tensor_on_the_cpu(template: Path) -> None:
    bounds = 'k: v if k == "cu_seq_lens_q" else v.to(device, non_blocking=True)'
    replace(template / "src/data/batching.py", "k: v.to(device, non_blocking=True)", bounds)


def answer_outside_of_autocast(template: Path) -> None:
    cast = "autocast(model.device, dtype or base_dtype(model)),"
    replace(template / "src/models/generation.py", cast, "")


def compute_the_loss_without_casts(template: Path) -> None:
    cast = 'autocast(batch["input_ids"].device, self.dtype)'
    replace(template / "src/training/loss.py", cast, "torch.enable_grad()")


def ask_for_determinism_late(template: Path) -> None:
    script = template / "scripts/train.py"
    found = re.search(r"    if config.deterministic:\n(?: {8}.*\n)+", script.read_text())
    assert found
    replace(script, found[0], "")
    replace(script, "    run(config", f"{found[0]}    run(config")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


ONE = "[Apache-2.0-4bit-github-none]"
GUARDS = [
    (
        bump_a_dependency_in_the_project_alone,
        f"test_render.py::test_the_lock_of_every_combination_checks_offline{ONE}",
    ),
    (
        bump_a_dependency_in_the_project_alone,
        "test_lock.py::test_the_root_asks_for_what_the_rendered_project_asks_for",
    ),
    (render_a_file_of_secrets, f"test_render.py::test_a_file_of_secrets_is_never_rendered{ONE}"),
    (
        ignore_a_folder_of_sources,
        "test_render.py::test_git_ignores_no_source_that_its_owner_adds",
    ),
    (
        rename_a_file,
        "test_policy.py::test_no_file_of_the_last_release_is_moved_without_a_migration",
    ),
    (put_an_answer_into_python, "test_render.py::test_no_answer_reaches_a_python_file"),
]


@pytest.mark.parametrize(
    ("mistake", "guard"), GUARDS, ids=[re.sub(r"\W+", " ", guard) for _, guard in GUARDS]
)
def test_a_mistake_is_caught(mistake: Callable[[Path], None], guard: str, tmp_path: Path) -> None:
    repository = shutil.copytree(snapshot().name, tmp_path / "repository")
    mistake(repository / "template")
    options = ("-q", "-n", "0", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", *options, f"tests/{guard}")
    # 1: the test ran and failed. A test that is gone or cannot be collected ends with 2, 4 or 5.
    output = run(*command, cwd=repository, code=1).stdout
    assert "1 failed" in output


# Mistakes that a CPU forgives in fp32, and a GPU does not.
STEP = (
    "test_walk.py::test_a_step_reads_no_value_and_multiplies_in_half_precision[full-dtype0-False]"
)
ROAD = "test_road.py::test_a_road_leads_to_an_exported_answer[lora-cpu]"
ORDER = (
    "test_scripts.py::test_cublas_is_told_of_determinism_before_torch_can_start_cuda[true-:4096:8]"
)
FORWARD = "test_walk.py::test_everything_that_a_forward_pass_makes_is_on_the_gpu[full]"
ON_A_GPU = [
    (hand_the_kernel_what_autocast_left, STEP),
    (wait_for_the_gpu_within_a_step, STEP),
    (leave_a_tensor_on_the_cpu, FORWARD),
    (answer_outside_of_autocast, ROAD),
    (compute_the_loss_without_casts, ROAD),
    (ask_for_determinism_late, ORDER),
]


# Each project's test in a fork of one process, which has imported what takes them longest.
FORKS = """
import os, sys
import bitsandbytes, datasets, peft, pytest, torch, torchao, transformers
for place, guard in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    if not os.fork():
        os.chdir(place)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*options, f"tests/{guard}"]))
    os.wait()
"""


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each guard prints in a template with its mistake."""
    whole = tmp_path_factory.mktemp("whole")
    repository = Path(snapshot().name)
    template = shutil.copytree(repository / "template", whole / "template")
    shutil.copytree(repository / "tests/in_project", template / "tests", dirs_exist_ok=True)
    places = {}
    for mistake, guard in ON_A_GPU:
        place = shutil.copytree(template, whole / mistake.__name__)
        mistake(place)
        places[place] = guard
    words = [word for pair in places.items() for word in pair]
    run(sys.executable, "-c", FORKS, *words, cwd=whole, HF_HOME=str(whole), OMP_NUM_THREADS="1")
    return {place.name: (place / "output.txt").read_text() for place in places}


@pytest.mark.parametrize("mistake", [mistake.__name__ for mistake, _ in ON_A_GPU])
def test_a_mistake_that_only_a_gpu_would_show_is_caught(mistake: str, mistaken) -> None:
    assert "1 failed" in mistaken[mistake], mistaken[mistake]
