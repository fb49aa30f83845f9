"""`emreason-report PATH...`: the paper's table, figures and one self-contained page over any set of run folders."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from emreason.reports.reading import collect
from emreason.types import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits 2 with one sentence on stderr where the input is bad; unfinished runs are named, not errors."""
    parser = argparse.ArgumentParser(
        prog="emreason-report", description="Tables (Markdown, CSV, LaTeX), figures (PNG, PDF) and a page (HTML) over run folders."
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", help="run folders, or folders above them (searched for summary.json)")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: report/ under the common parent of the paths)")
    arguments = parser.parse_args(argv)
    try:
        runs = collect(arguments.paths)
        from emreason.reports.writing import print_runs, write_report  # matplotlib and scipy

        out = Path(arguments.out) if arguments.out else _common_parent(arguments.paths) / "report"
        print_runs(runs, Console())
        written = write_report(runs, out)
    except UserError as error:
        print(f"emreason-report: {error}", file=sys.stderr)
        sys.exit(2)
    print("Written:", *(f"  {path}" for path in written), sep="\n")


def _common_parent(paths: Sequence[str]) -> Path:
    common = Path(os.path.commonpath([os.path.abspath(path) for path in paths]))  # noqa: PTH100  (symlinks stay as typed)
    return common if common.is_dir() else common.parent


if __name__ == "__main__":
    main()
