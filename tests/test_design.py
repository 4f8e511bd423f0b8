"""Imports point one way, folders do not import each other, heavy imports stay inside commands."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import architecture

SOURCE = Path(__file__).parents[1] / "src" / "rematch"
# A module or folder imports from the lines above; modules of one folder import each other freely.
ORDER = """
errors console
arguments
files prompts
matching tokens losses
data
backbone
scoring
model
encoding interpretability
search evaluate train
demo serve
cli
"""
LIGHT = ("cli", "errors", "prompts", "data.schema", "train.recipe", "matching")
HEAVY = {"torch", "transformers", "sentence_transformers", "datasets", "peft", "lancedb"}


def trees():
    modules = architecture.modules(SOURCE)
    return {name: tree for name, tree in modules.items() if tree.body and name != "rematch"}


def rank(module: str) -> int:
    """The line of ORDER that names the folder of a module, or the module if it is in the root."""
    for number, line in enumerate(ORDER.strip().splitlines()):
        if architecture.folder(module) in line.split():
            return number
    raise AssertionError(f"{module} has no place in ORDER")


def test_imports_point_one_way():
    modules = trees()
    for name, tree in modules.items():
        for target in architecture.imports(name, tree, set(modules)):
            inside = architecture.folder(target) == architecture.folder(name)
            assert inside or rank(target) < rank(name), f"{name} imports {target}"


def test_neither_modules_nor_folders_import_each_other():
    figures = architecture.measure(SOURCE)
    assert figures["module cycles"] == []
    assert figures["folder cycles"] == []


def test_imports_are_absolute():
    for name, tree in trees().items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.level), name
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("rematch.") for alias in node.names), name


def test_bindings_say_what_they_hold():
    figures = architecture.measure(SOURCE)
    assert figures["vague share (%)"] <= 0.5, figures["vague names"]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name):
    body = trees()[name].body
    names = [node.names for node in body if isinstance(node, ast.Import)]
    imported = {alias.name for aliases in names for alias in aliases}
    imported |= {node.module for node in body if isinstance(node, ast.ImportFrom) and node.module}
    allowed = {"torch"} if name == "matching" else set()
    assert not {module.partition(".")[0] for module in imported} & HEAVY - allowed


def test_durations_do_not_depend_on_the_clock():
    """The clock may be set back or forward while something runs."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {"time", "time_ns"} & {alias.name for alias in node.names}, name
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time":
                assert node.attr not in ("time", "time_ns"), f"{name}: use time.monotonic"


def test_test_files_do_not_import_each_other():
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("test_"), path.name


def test_no_file_is_called_utils():
    assert not [path for path in SOURCE.rglob("*.py") if "util" in path.name]
