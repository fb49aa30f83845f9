"""`make faults`: plants the faults of `faults.py`, one at a time, in a copy of the tree, and runs the tests that must notice.

    python tests/plant.py [ONLY]

Every fault has a process of its own, a fork of this one, which has imported the libraries (not the package). Exit code 1: a fault
survived, or its text no longer applies, or its tests fail without it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from faults import FAULTS, Fault

REPO = Path(__file__).resolve().parents[1]
TREE = ("src", "tests", "conf", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "constraints.txt")
TIMEOUT = 300  # seconds for the tests of one fault
FAILED = 1  # pytest's exit code where tests ran and failed; others say that they could not be run


def main(only: str) -> int:
    chosen = [fault for fault in FAULTS if only in ("", fault.name)]
    if not chosen:
        print(f"There is no fault {only!r}; tests/faults.py lists them.")
        return 1
    import_libraries()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        copy = copied(Path(place) / "tree")
        code, said = run(copy, sorted({test for fault in chosen for test in fault.tests}), TIMEOUT * 10)
        if code:
            print(f"The named tests do not pass without any fault:\n{said}")
            return 1
        outcomes = {fault.name: outcome(copy, fault) for fault in chosen}
    missed = [f"{name} ({how})" for name, how in outcomes.items() if how != "caught"]
    caught, minutes = len(chosen) - len(missed), (time.monotonic() - began) / 60
    print(f"{len(chosen)} planted, {caught} caught, {len(missed)} not{': ' if missed else ''}{'; '.join(missed)}. {minutes:.1f} min")
    return 1 if missed else 0


def import_libraries() -> None:
    """All that tests and package import, and then not the package."""
    sys.path.insert(0, str(REPO / "src"))
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import emreason.report
    import emreason.train  # noqa: F401

    sys.path.remove(str(REPO / "src"))
    for name in [name for name in sys.modules if name.split(".")[0] == "emreason"]:
        del sys.modules[name]


def copied(copy: Path) -> Path:
    """The tree in another place, and tests and their subprocesses made to find the package there."""
    copy.mkdir()
    for name in TREE:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
        elif (REPO / name).exists():
            shutil.copy(REPO / name, copy / name)
    os.environ["PYTHONPATH"] = str(copy / "src")
    return copy


def outcome(copy: Path, fault: Fault) -> str:
    """`caught`, or what happened instead; told at once."""
    path, began = copy / fault.file, time.monotonic()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(fault.old) != 1:
        how = f"its text occurs {text.count(fault.old)} times in {fault.file}"
    else:
        write(path, text.replace(fault.old, fault.new))
        code, said = run(copy, fault.tests, TIMEOUT)
        write(path, text)
        how = {FAILED: "caught", 0: "SURVIVED"}.get(code, f"its tests did not run, pytest's exit code {code}: {said[-1500:]}")
    print(f"{how if how == 'caught' else how.upper():9} {time.monotonic() - began:5.1f} s  {fault.name}", flush=True)
    return how


def write(path: Path, text: str) -> None:
    """With a time of its own in whole seconds: that, and the size, is what compiled code is recognised by."""
    after = path.stat().st_mtime + 2
    path.write_text(text, encoding="utf-8")
    os.utime(path, (after, after))


def run(copy: Path, tests: Iterable[str], timeout: float) -> tuple[int, str]:
    """pytest's exit code (minus a signal's number) and output."""
    log = copy / "log.txt"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that what the tests start can be ended with them
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(copy)
        sys.path[:] = [str(copy / "src"), str(copy / "tests"), *(p for p in sys.path if p != str(REPO / "tests"))]
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    deadline = time.monotonic() + timeout
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
