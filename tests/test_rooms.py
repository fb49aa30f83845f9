"""The rooms of the package: imports point one way, no room is crowded, the drawing in the README is that of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "emreason"
README = PACKAGE / "README.md"
ORDER = ("reports", "tracking", "em", "runs", "schemes", "scores", "engines", "models", "questions")
"""A room imports rooms to its right only."""
BESIDE = ("bench", "laboratory")
COMMANDS = ("train", "evaluate", "report", "reproduce")
LOWEST = ("types", "progress", "")
"""What everything may import; the last is the package itself, for its version."""


def imports(file: Path) -> set[str]:
    """The rooms and top files that `file` imports, anywhere in it; '' is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            module = node.module or ""
            names = [f"emreason.{alias.name}" for alias in node.names] if module == "emreason" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("emreason.")}
    rooms = {*ORDER, *BESIDE, *COMMANDS, *LOWEST}
    return {name if name in rooms else "" for name in found}  # `__version__`


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def arrows() -> set[tuple[str, str]]:
    """(room, a room it imports), as the code has it."""
    return {(room, name) for room in ORDER for file in files_of(room) for name in imports(file) - {room, *LOWEST}}


def blocks() -> list[str]:
    """The Mermaid graphs of the README."""
    return re.findall(r"```mermaid\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_every_file_is_in_a_room():
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == {*ORDER, *BESIDE}
    assert {p.stem for p in PACKAGE.glob("*.py")} == {"__init__", "types", "progress", *COMMANDS}


@pytest.mark.parametrize("room", [*ORDER, *BESIDE])
def test_a_room_says_what_it_is_and_is_not_crowded(room):
    for folder in {file.parent for file in files_of(room)}:
        assert len([p for p in folder.iterdir() if p.is_file() and p.suffix != ".pyc" and p.name != "__init__.py"]) <= 10, folder
        opening = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert len(opening.body) == 1, f"{folder}: a docstring and nothing else"
        assert 3 <= len((ast.get_docstring(opening) or "").splitlines()) <= 8, folder


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_one_way(room):
    below = {*ORDER[ORDER.index(room) :], *LOWEST}
    for file in files_of(room):
        assert imports(file) <= below, f"{file.relative_to(PACKAGE)} imports {sorted(imports(file) - below)} from above"


def test_nobody_imports_the_rooms_beside_or_a_command():
    for file in [PACKAGE / f"{name}.py" for name in ("types", "progress", *COMMANDS)]:  # `__init__` names things of everywhere
        allowed = {*ORDER, *LOWEST, *COMMANDS} if file.stem in COMMANDS else set(LOWEST)
        assert imports(file) <= allowed, file
    for room in BESIDE:
        for file in files_of(room):
            assert imports(file).isdisjoint({*BESIDE} - {room}), file


def test_the_drawing_has_the_arrows_of_the_code():
    drawn = set()
    for line in blocks()[0].splitlines():
        if match := re.fullmatch(r"\s*(\w+) --> ([\w &]+)", line):
            drawn |= {(match[1], target) for target in match[2].split(" & ")}
    assert drawn == arrows()


def test_the_readme_names_every_file_and_no_other():
    text = README.read_text(encoding="utf-8")
    way = re.findall(r"\b(\w+/\w+\.py)\b", blocks()[1])
    assert way
    assert [name for name in way + re.findall(r"`((?!tests/)\w+/\w+\.py)`", text) if not (PACKAGE / name).is_file()] == []
    files = {file.name for room in ORDER for file in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
    tour = text.rpartition("```mermaid")[2].partition("```")[2]
    assert files - set(re.findall(r"\w+\.py", tour)) == set()
    within = {file.parent.name for room in ORDER for file in files_of(room)} - {*ORDER}
    assert [name for name in within if f"{name}/" not in tour] == []
    assert set(re.findall(r"\w+\.py", tour.partition("## In Python")[0])) - files <= {
        f"{name}.py" for name in (*COMMANDS, "tabular", "exact", "gradients")
    }
