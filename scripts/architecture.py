"""Measure the shape of the package: file and function sizes, vague names, import cycles, arrows
between folders.

Usage: python scripts/architecture.py [SOURCE] [--json FILE]

A binding is a name that code introduces: a parameter, an assigned or annotated name, a loop,
``with`` or ``except`` target. It is vague if the whole name, without underscores at its ends, is
in ``VAGUE``.
"""

import argparse
import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "rematch"
VAGUE = frozenset("found one own asked told given some many few known seen thing stuff".split())


def modules(source: Path) -> dict[str, ast.Module]:
    """Syntax trees of a package's modules by dotted name, without the package's own."""
    trees = {}
    for path in sorted(source.rglob("*.py")):
        parts = list(path.relative_to(source).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        trees[".".join(parts) or PACKAGE] = ast.parse(path.read_text())
    return trees


def folder(module: str) -> str:
    """The folder that holds a module; a module in the root stands for itself."""
    return module.partition(".")[0]


def bindings(tree: ast.Module) -> Iterator[str]:
    """Names that a module introduces, one for each place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def imports(name: str, tree: ast.Module, package_modules: set[str]) -> set[str]:
    """Modules of the package that a module imports, anywhere in its code."""
    targets = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, _, target = node.module.partition(".")
        if package != PACKAGE:
            continue
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            targets.add(inner if inner in package_modules else target or PACKAGE)
    return targets - {name, PACKAGE}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""

    def reachable(start: str) -> set[str]:
        reached: set[str] = set()
        waiting = [start]
        while waiting:
            for following in graph.get(waiting.pop(), ()):
                if following not in reached:
                    reached.add(following)
                    waiting.append(following)
        return reached

    reach = {node: reachable(node) for node in graph}
    groups = {
        frozenset({node, *(m for m in reach[node] if node in reach[m])})
        for node in graph
        if node in reach[node]
    }
    return sorted(sorted(group) for group in groups)


def measure(source: Path) -> dict[str, Any]:
    """All figures of one source tree."""
    trees = modules(source)
    graph = {name: imports(name, tree, set(trees)) for name, tree in trees.items()}
    between: dict[str, set[str]] = {}
    for name, targets in graph.items():
        between.setdefault(folder(name), set()).update(
            folder(t) for t in targets if folder(t) != folder(name)
        )
    folders = {folder(name) for name in trees if "." in name}
    sizes: dict[type, list[tuple[int, str]]] = {ast.FunctionDef: [], ast.ClassDef: []}
    names: Counter[str] = Counter()
    for name, tree in trees.items():
        names.update(bindings(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = ast.ClassDef if isinstance(node, ast.ClassDef) else ast.FunctionDef
                sizes[kind].append(
                    ((node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.name}")
                )
    lines = {name: len(path_of(source, name).read_text().splitlines()) for name in trees}
    vague = {name: count for name, count in names.items() if name.strip("_") in VAGUE}
    longest_file = max(lines, key=lambda name: lines[name])
    return {
        "files": sum(1 for count in lines.values() if count),
        "files in the root": sum(
            1 for name, count in lines.items() if "." not in name and count and name not in folders
        ),
        "lines": sum(lines.values()),
        "longest file": [lines[longest_file], longest_file],
        "longest function": list(max(sizes[ast.FunctionDef])),
        "longest class": list(max(sizes[ast.ClassDef])),
        "lines over 99 characters": sum(
            len(line) > 99
            for name in trees
            for line in path_of(source, name).read_text().splitlines()
        ),
        "bindings": names.total(),
        "vague bindings": sum(vague.values()),
        "vague share (%)": round(100 * sum(vague.values()) / names.total(), 2),
        "vague names": dict(sorted(vague.items(), key=lambda item: -item[1])),
        "module cycles": cycles(graph),
        "folder cycles": cycles(between),
        "arrows between folders": sorted(
            f"{start} → {end}"
            for start, ends in between.items()
            for end in ends
            if start in folders and end in folders
        ),
    }


def path_of(source: Path, module: str) -> Path:
    """The file of a module."""
    base = source if module == PACKAGE else source.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def main() -> None:
    """Print a table of the figures; with ``--json`` write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "src" / PACKAGE
    parser.add_argument(
        "source", type=Path, nargs="?", default=default, help="the package's folder"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    figures = measure(options.source)
    for name, value in figures.items():
        if isinstance(value, list) and value and isinstance(value[0], int):
            value = f"{value[0]} ({value[1]})"
        elif isinstance(value, list):
            value = f"{len(value)}  {'; '.join(map(str, value))}"
        print(f"{name:28} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
