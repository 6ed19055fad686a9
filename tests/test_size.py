"""The rendered project stays readable in an hour, and changes nobody else's modules."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from helpers import ROOT, TEMPLATE, reachable

FILES = sorted([*(TEMPLATE / "src").rglob("*.py"), *(TEMPLATE / "scripts").rglob("*.py")])
# What the code may grow to. Raise a number in the commit that needs it, and say there what for.
# Nodes count because lines can be packed.
CODE_LINES, REACHABLE, NODES, LINES = 4890, 3760, 52_000, 7610
TEST_LINES = 4000
STORY = ("src/training/run.py", "src/training/trainer.py", "src/training/loss.py")
STORY_CODE_LINES = 400
FUNCTION_LINES = 50  # with its docstring
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
# Switches that torch documents as such: see its notes on reproducibility.
SWITCHES = {
    "torch.backends.cudnn.deterministic",
    "torch.backends.cudnn.benchmark",
    "torch.utils.deterministic.fill_uninitialized_memory",
    "functorch.activation_memory_budget",  # torch._functorch.config, as PyTorch's notes on it say
}
HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(text: str) -> int:
    """Count the lines that are not blank, and not comment or docstring alone."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, HAS_DOCSTRING) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_lines_of_code_are_counted_without_blank_lines_comments_and_docstrings() -> None:
    text = '"""Doc."""\n\nimport os  # why\n\n\ndef f(a):\n    """Doc.\n\n    More.\n    """\n'
    text += '    # why\n    return """a\nb""", (\n        a,\n    )\n'
    assert code_lines(text) == 6


def test_the_code_keeps_within_its_budget() -> None:
    texts = [path.read_text() for path in FILES]
    assert sum(map(code_lines, texts)) <= CODE_LINES
    assert sum(1 for text in texts for _ in ast.walk(ast.parse(text))) <= NODES
    assert sum(len(text.splitlines()) for text in texts) <= LINES


def test_what_training_imports_keeps_within_its_budget() -> None:
    paths = reachable(TEMPLATE, "scripts/train.py")
    assert sum(code_lines((TEMPLATE / path).read_text()) for path in paths) <= REACHABLE


def test_an_owner_gets_no_more_tests_than_the_budget_allows() -> None:
    tests = (TEMPLATE / "tests").glob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in tests) <= TEST_LINES


def test_the_story_of_a_run_and_its_loop_keep_within_theirs() -> None:
    assert sum(code_lines((TEMPLATE / path).read_text()) for path in STORY) <= STORY_CODE_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TEMPLATE)))
def test_a_function_fits_a_screen_and_a_file_says_its_job(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES} == {}


def patches(text: str) -> list[str]:
    """Return the modules that code imports for patching, and their attributes that it assigns."""
    tree, found, imported = ast.parse(text), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {name.asname or name.name.split(".")[0] for name in node.names}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or n.name for n in node.names]
            found += [name for name in names if name.startswith(("unittest", "mock"))]
        elif isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"setattr", "delattr"}:
            name = getattr(node.args[1], "value", "?")
            targets = [ast.Attribute(node.args[0], name, ast.Store())]
        for target in targets:
            for leaf in ast.walk(target):
                written = ast.unparse(leaf)
                root, dot, _ = written.partition(".")
                stored = isinstance(leaf, ast.Attribute) and isinstance(leaf.ctx, ast.Store)
                if stored and dot and root in imported and written not in SWITCHES:
                    found.append(written)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "from unittest import mock",
        "import unittest.mock",
        "import torch\ntorch.compile = None",
        "import torch.nn as nn\nnn.Linear.forward, a = 1, 2",
        "from transformers import utils\nsetattr(utils, 'is_scipy_available', None)",
        "from peft import PeftModel\nPeftModel.save_pretrained += 1",
    ],
)
def test_a_patch_is_noticed(text: str) -> None:
    assert patches(text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TEMPLATE)))
def test_nothing_patches_somebody_elses_module(path: Path) -> None:
    assert patches(path.read_text()) == []


def test_the_readme_states_the_size() -> None:
    stated = re.search(r"About ([\d,]+) lines of code", (ROOT / "README.md").read_text())
    assert stated
    lines = sum(code_lines(path.read_text()) for path in FILES)
    assert abs(int(stated[1].replace(",", "")) - lines) <= 100
