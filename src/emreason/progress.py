"""What long work says while it lasts: a live bar in a terminal, elsewhere a line every few seconds. Nothing is silent for ten seconds."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from emreason.types import plain

EVERY_S = 5.0


@functools.cache
def console() -> Console:
    """Where people are told what happens: stderr, model text never read as markup."""
    return Console(stderr=True, markup=False)


def rank() -> int:
    """This process's rank among those that work on one run, as Lightning reads it from the launcher's environment."""
    return int(next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if os.environ.get(name)), 0))


class _Voice:
    """Repeats what the innermost open work has come to whenever nothing was said for `EVERY_S`.

    A thread, since the work may be inside a single call of a library for minutes.
    """

    def __init__(self) -> None:
        self.open: list[Bar] = []
        self.said = time.monotonic()
        self.thread: threading.Thread | None = None

    def say(self, line: str) -> None:
        self.said = time.monotonic()
        console().print(Text("\n".join(map(plain, line.split("\n")))), soft_wrap=True)

    @contextmanager
    def during(self, work: Bar) -> Iterator[None]:
        self.open.append(work)
        self.said = time.monotonic()
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        try:
            yield
        finally:
            self.open.remove(work)

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, EVERY_S / 5))
            if time.monotonic() - self.said > EVERY_S and (work := next(iter(self.open[-1:]), None)) and (line := work.line()):
                self.say(line)


_voice = _Voice()


def say(text: str) -> None:
    """Print lines of plain text: no markup is read in them, no control character passes."""
    if text:
        _voice.say(text)


@dataclass
class Bar:
    """Counts units of work done, of which `resumed` were before it began, and tokens processed; `note` is shown beside them."""

    label: str
    total: int = 0
    unit: str = ""
    progress: Progress | None = None
    resumed: int = 0
    done: int = 0
    tokens: int = 0
    note: str = ""
    started: float = field(default_factory=time.monotonic)

    def update(self, done: int = 0, tokens: int = 0, note: str | None = None) -> None:
        """Add `done` units and `tokens` tokens."""
        self.done, self.tokens = self.done + done, self.tokens + tokens
        self.note = self.note if note is None else note
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=self.done, note=self._rate())

    def line(self) -> str:
        """What to say where there is no live bar."""
        if self.progress is not None:
            return ""
        seconds = time.monotonic() - self.started
        if not self.unit:
            return f"{self.label} · {seconds:.0f} s so far"
        fresh, rest = self.done - self.resumed, self.total - self.done
        # the first units come late and together: no estimate from them
        left = f" · {seconds / fresh * rest:.0f} s left" if fresh > 0.05 * (fresh + rest) else ""
        return f"{self.label}: {self.done}/{self.total} {self.unit} · {self._rate()} · {seconds:.0f} s{left}"

    def _rate(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.started, 1e-6)
        return " · ".join(filter(None, [self.note, f"{rate:.0f} tokens/s"]))


@contextmanager
def bar(label: str, total: int, unit: str, *, resumed: int = 0, enabled: bool = True) -> Iterator[Bar]:
    """Show progress over `total` units; ends with one summary line. `enabled=False` (ranks > 0) shows nothing."""
    current = Bar(label, total, unit, resumed=resumed, done=resumed, note="resumed" if resumed else "")
    if not enabled:
        yield current
        return
    with ExitStack() as shown:
        shower = console()
        if shower.is_terminal and shower.file.isatty() and not shower.is_dumb_terminal:  # FORCE_COLOR makes files terminals
            counted = ("{task.description}", BarColumn(24), MofNCompleteColumn(), unit, "{task.fields[note]}")
            columns = (*counted, TimeElapsedColumn(), "left", TimeRemainingColumn())
            current.progress = shown.enter_context(Progress(*columns, console=console(), transient=True))
            current.progress.add_task(label, total=total, completed=resumed, note=current.note)
        shown.enter_context(_voice.during(current))
        yield current
    seconds = time.monotonic() - current.started
    _voice.say(f"{label}: {current.done}/{total} {unit} · {current._rate()} · {seconds:.1f} s")


@contextmanager
def doing(label: str, *, at_once: bool = True) -> Iterator[Bar]:
    """Say what is done, that it still is, and how long it took. `at_once=False`: nothing unless it takes longer than `EVERY_S`."""
    current = Bar(label)
    if rank() > 0:
        yield current
        return
    if at_once:
        _voice.say(f"{label} …")
    with _voice.during(current):
        yield current
    seconds = time.monotonic() - current.started
    if at_once or seconds > EVERY_S:
        _voice.say(" · ".join(filter(None, [label, current.note, f"{seconds:.1f} s"])))
