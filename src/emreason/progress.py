"""One progress line for long work: a live bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 10.0


@dataclass
class Bar:
    """Counts units of work done and tokens processed; `note` is shown beside them."""

    label: str
    total: int
    unit: str
    console: Console
    progress: Progress | None = None
    done: int = 0
    tokens: int = 0
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    def update(self, done: int = 0, tokens: int = 0, note: str | None = None) -> None:
        """Add `done` units and `tokens` tokens."""
        self.done, self.tokens = self.done + done, self.tokens + tokens
        self.note = self.note if note is None else note
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=self.done, note=self._rate())
        elif time.monotonic() - self.printed > EVERY_S:
            self.printed = time.monotonic()
            seconds = time.monotonic() - self.started
            # the first units come late and together: no estimate from them
            left = f" · {seconds / self.done * (self.total - self.done):.0f} s left" if self.done > 0.05 * self.total else ""
            self.console.print(f"{self.label}: {self.done}/{self.total} {self.unit} · {self._rate()}{left}", highlight=False)

    def _rate(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.started, 1e-6)
        return " · ".join(filter(None, [self.note, f"{rate:.0f} tokens/s"]))


@contextmanager
def bar(label: str, total: int, unit: str, *, enabled: bool = True) -> Iterator[Bar]:
    """Show progress over `total` units; ends with one summary line. `enabled=False` (ranks > 0) shows nothing."""
    console = Console(stderr=True, quiet=not enabled, markup=False)
    if not (enabled and console.is_terminal):
        current = Bar(label, total, unit, console)
        yield current
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, transient=True
        ) as progress:
            progress.add_task(label, total=total, note="")
            current = Bar(label, total, unit, console, progress)
            yield current
    seconds = time.monotonic() - current.started
    console.print(f"{label}: {current.done}/{total} {unit} · {current._rate()} · {seconds:.1f} s", highlight=False)
