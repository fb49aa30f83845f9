"""`emreason-report PATH...`: the paper's table, figures and one self-contained page over any set of run folders."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from emreason.reports.reading import collect
from emreason.runs.summary import read_summary
from emreason.types import UserError

EVERY_S = 20.0
"""Seconds between two looks at the runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits 2 with one sentence on stderr where the input is bad; unfinished runs are named, not errors."""
    parser = argparse.ArgumentParser(
        prog="emreason-report", description="Tables (Markdown, CSV, LaTeX), figures (PNG, PDF) and a page (HTML) over run folders."
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", help="run folders, or folders above them (searched for summary.json)")
    parser.add_argument(
        "--watch", action="store_true", help="write it again whenever a run has changed, until Ctrl-C; the page reloads itself"
    )
    parser.add_argument("--out", metavar="DIR", help="where to write (default: report/ under the common parent of the paths)")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out) if arguments.out else _common_parent(arguments.paths) / "report"
    try:
        if arguments.watch:
            _watch([Path(path) for path in arguments.paths], out)
        runs = collect(arguments.paths)
        from emreason.reports.writing import print_runs, write_report  # matplotlib and scipy

        print_runs(runs, Console())
        written = write_report(runs, out)
    except UserError as error:
        print(f"emreason-report: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted; the same command begins again.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    print("Written:", *(f"  {path}" for path in written), sep="\n")


def _watch(paths: Sequence[Path], out: Path) -> None:
    """Write the report whenever a summary has changed, for as long as nobody presses Ctrl-C. There need be no run yet."""
    from emreason.reports.writing import write_report

    print(f"Watching; the page: {out / 'report.html'}. Ctrl-C ends it.", flush=True)
    written: dict[Path, int] = {}
    try:
        while True:
            now = {file: file.stat().st_mtime_ns for path in paths for file in path.rglob("summary.json")}
            if now != written:
                write_report(collect([path for path in paths if path.exists()]), out, refresh=EVERY_S)
                done = sum(read_summary(file.parent).get("status") == "finished" for file in now)
                print(f"{time.strftime('%H:%M:%S')}: {len(now)} runs, {done} finished", flush=True)
                written = now
            time.sleep(EVERY_S)
    except KeyboardInterrupt:
        print()


def _common_parent(paths: Sequence[str]) -> Path:
    common = Path(os.path.commonpath([os.path.abspath(path) for path in paths]))  # noqa: PTH100  (symlinks stay as typed)
    return common.parent if common.is_file() else common  # a sweep that is yet to begin is a folder


if __name__ == "__main__":
    main()
