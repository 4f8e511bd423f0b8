"""docs/architecture.md names functions that exist, in walks short enough to follow."""

import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "rematch"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PLACE = re.compile(r"`([\w/]+\.py):([\w.]+)`")
SECTIONS = PAGE.split("\n## ")[1:]
WALKS = {
    section.partition("\n")[0]: re.findall(r"^(\d+)\. (.*)", section, re.MULTILINE)
    for section in SECTIONS
    if "\n1. " in section
}


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACE.findall(PAGE))))
def test_every_function_on_the_page_exists(file, name):
    assert (SOURCE / file).is_file()
    module = import_module("rematch." + file.removesuffix(".py").replace("/", "."))
    assert callable(attrgetter(name)(module))


def test_there_are_four_walks_of_at_most_twelve_steps():
    assert len(WALKS) == 4
    for title, steps in WALKS.items():
        numbers = [int(number) for number, _ in steps]
        assert numbers == list(range(1, len(steps) + 1)), title
        assert len(steps) <= 12, title
        for _, text in steps:
            assert PLACE.match(text), f"{title}: a step starts with `file:function`: {text}"


def test_the_page_lists_every_folder_and_module_of_the_root():
    table = next(section for section in SECTIONS if section.startswith("Folders"))
    listed = set(re.findall(r"`([\w.]+/?)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))))
    folders = {f"{path.name}/" for path in SOURCE.iterdir() if path.is_dir()} - {"__pycache__/"}
    modules = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"}
    assert listed == folders | modules
