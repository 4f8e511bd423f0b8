"""Imports point one way, files stay small, heavy imports stay inside commands."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "rematch"
# A module may import from its own rank and below.
RANKS = [
    {"errors", "prompts", "files"},
    {"data", "evaluate.metrics", "matching"},
    {"memory", "tokens", "pictures", "turns", "reading", "cache", "lora", "parallel"},
    {"backbone", "batch"},
    {"scoring"},
    {"model"},
    {"vectors"},
    {"encoder"},
    {"losses", "search", "attention"},
    {"train", "evaluate"},
    {"report"},
    {"demo", "serve"},
    {"cli"},
]


def rank(module: str) -> int:
    for level, names in reversed(list(enumerate(RANKS))):
        if any(
            module == n or module.startswith(n + ".") for n in names
        ) and module not in set().union(*RANKS[:level]):
            return level
    raise AssertionError(f"{module} has no place in the house plan")


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        name = (
            ".".join(path.relative_to(SOURCE).with_suffix("").parts)
            .removesuffix("__init__")
            .strip(".")
        )
        if name and path.read_text().strip():
            yield name, ast.parse(path.read_text())


def test_imports_point_one_way():
    for name, tree in modules():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.level), (
                f"{name}: relative import"
            )
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("rematch.") for a in node.names), (
                    f"{name}: import rematch.x"
                )
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rematch."):
                target = node.module.removeprefix("rematch.")
                targets = [
                    f"{target}.{a.name}" if target == "data" else target for a in node.names
                ]
                for imported in targets:
                    assert rank(imported) <= rank(name), f"{name} imports {imported}"


def test_light_modules_import_nothing_heavy_at_the_top():
    for name, tree in modules():
        if name in ("cli", "errors", "prompts", "train.recipe", "matching", "data.schema"):
            tops = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
            tops |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
            heavy = {"transformers", "sentence_transformers", "datasets", "peft"} | (
                {"torch"} if name != "matching" else set()
            )
            assert not {t.partition(".")[0] for t in tops if t} & heavy, name


def test_no_file_is_very_long_and_none_is_called_utils():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path
        assert "util" not in path.name
