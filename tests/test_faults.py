"""The list of faults does not rot: what it replaces is there, and so are the tests that it names. `make faults` plants them."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPO
from faults import FAULTS, Fault


@functools.cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault):
    assert (REPO / fault.file).read_text(encoding="utf-8").count(fault.old) == 1
    assert fault.new != fault.old
    assert fault.tests
    for test in fault.tests:
        file, name = test.split("::")
        assert name.partition("[")[0] in functions(REPO / file), test


def test_every_fault_has_a_name_of_its_own():
    assert [name for name, n in Counter(fault.name for fault in FAULTS).items() if n > 1] == []
    assert len(FAULTS) >= 60
