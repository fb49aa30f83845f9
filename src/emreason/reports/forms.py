"""The form of a report's table: Markdown, LaTeX (booktabs) and rich. Names in it are untrusted and escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from emreason.types import plain

DAGGER = "†"
GAP = 2  # characters between columns
PART = r"[^\s_]*_+|[^\s_]+"  # of a text, what a line may end after
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "–": "--",
    DAGGER: r"\textsuperscript{\textdagger}",
    "—": "---",
}


@dataclass(frozen=True)
class Entry:
    """One table cell: plain text and whether it is set in bold."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table before it takes a form. `numeric` columns are set flush right; `rules` are rows before which a line is drawn."""

    title: str
    columns: list[str]
    rows: list[list[Entry]]
    numeric: tuple[int, ...] = ()
    rules: tuple[int, ...] = ()


def markdown(table: Table) -> str:
    """A GitHub table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    rows = [[f"**{escape_markdown(e.text)}**" if e.bold else escape_markdown(e.text) for e in row] for row in table.rows]
    return "\n".join([line([escape_markdown(c) for c in table.columns]), line(rule), *map(line, rows)]) + "\n"


def escape_markdown(text: str) -> str:
    """One line of Markdown in which nothing of `text` acts as markup or as HTML."""
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_{}[]#|~!" else c for c in text)


def latex(table: Table, caption: str, notes: Sequence[str]) -> str:
    """A floating booktabs table (needs \\usepackage{booktabs}) with the notes below it."""
    align = "".join("r" if i in table.numeric else "l" for i in range(len(table.columns)))

    def line(cells: Sequence[str]) -> str:
        return "    " + " & ".join(cells) + r" \\"

    body = []
    for n, row in enumerate(table.rows):
        if n in table.rules:
            body.append(r"    \midrule")
        body.append(line([rf"\textbf{{{escape_latex(e.text)}}}" if e.bold else escape_latex(e.text) for e in row]))
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"  \centering",
            rf"  \caption{{{escape_latex(table.title)}. {escape_latex(caption)}}}",
            rf"  \begin{{tabular}}{{{align}}}",
            r"    \toprule",
            line([escape_latex(c) for c in table.columns]),
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            *[rf"  \par\smallskip{{\footnotesize {escape_latex(note)}\par}}" for note in notes],
            r"\end{table}",
            "",
        ]
    )


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it reads."""
    return "".join(LATEX.get(c, c) for c in plain(text))


def rich_table(table: Table, width: int) -> RichTable:
    """For a terminal of `width` characters. Cells are Text objects: nothing in them is read as markup.

    What does not fit breaks between words or after an underscore, and elsewhere only where that is not enough.
    """
    drawn = RichTable(
        title=Text(table.title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True
    )
    widths = _widths(table, width)
    for i, (column, wide) in enumerate(zip(table.columns, widths, strict=True)):
        heading = Text("\n".join(_broken(word, wide) for word in plain(column).split()))
        drawn.add_column(heading, justify="right" if i in table.numeric else "left", width=wide, overflow="fold")
    for n, row in enumerate(table.rows):
        cells = [Text(_broken(plain(e.text), wide), style="bold" if e.bold else "") for e, wide in zip(row, widths, strict=True)]
        drawn.add_row(*cells, end_section=n + 1 in table.rules)
    return drawn


def unbroken(table: Table) -> int:
    """Characters a line of the table takes in a terminal that breaks no cell; a heading has a line per word."""
    return sum(wide + GAP for wide in _extents(table, r".+"))


def _widths(table: Table, room: int) -> list[int]:
    """Of each column, so that all fit into `room`: whichever has the most to spare gives way, above its longest word, part, letter."""
    widths, words, parts = (_extents(table, unit) for unit in (r".+", r"\S+", PART))
    while sum(wide + GAP for wide in widths) > room and max(widths) > 1:
        spare = [(max(wide - word, 0), max(wide - part, 0), wide) for wide, word, part in zip(widths, words, parts, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths


def _extents(table: Table, unit: str) -> list[int]:
    """Of each column, the longest match of `unit` in its cells and in its heading's words."""
    texts = [[*plain(column).split(), *(plain(row[i].text) for row in table.rows)] for i, column in enumerate(table.columns)]
    return [max((len(found) for text in column for found in re.findall(unit, text)), default=1) for column in texts]


def _broken(text: str, width: int) -> str:
    """A text whose words longer than `width` have line breaks after underscores."""

    def fold(word: re.Match[str]) -> str:
        lines = [""]
        for part in re.findall(PART, word[0]):
            lines[-1:] = [lines[-1] + part] if len(lines[-1] + part) <= width or not lines[-1] else [lines[-1], part]
        return "\n".join(lines)

    return re.sub(rf"\S{{{width + 1},}}", fold, text)
