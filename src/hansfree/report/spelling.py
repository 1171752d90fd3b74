"""A table as Markdown, CSV, LaTeX, and on a terminal."""

import csv
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from hansfree.report.tables import Cell, Table


def to_markdown(table: Table) -> str:
    """The table and its notes as GitHub Markdown."""

    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(texts)} |\n"

    rule = line("---:" if column.parts else ":---" for column in table.columns)
    body = "".join(line(escaped(full_text(cell)) for cell in row.cells) for row in table.lines)
    notes = "".join(f"\n{escaped(note)}\n" for note in table.notes)
    return line(escaped(column.title) for column in table.columns) + rule + body + notes


def to_csv(table: Table) -> str:
    """The numbers behind the table, a column each, to six decimals; what is missing stays empty, with its reason."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [
        f"{column.key}_{part}" if part else column.key for column in table.columns for part in column.parts or ("",)
    ]
    writer.writerow(["variant", *names, "reason"])
    for line in table.lines:
        values: list[Any] = [line.variant]
        for column, cell in zip(table.columns, line.cells):
            numbers = cell.numbers or (None,) * len(column.parts)
            values += [None if x is None else round(x, 6) for x in numbers] if column.parts else [cell.text]
        writer.writerow([*values, line.reason])
    return file.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs ``tabular``, the notes as comments before it."""

    def line(texts: Iterable[str]) -> str:
        return f"  {' & '.join(texts)} \\\\\n"

    notes = "".join(f"% {_one_line(note)}\n" for note in table.notes)
    body = "".join(line(_latex(full_text(cell)) for cell in row.cells) for row in table.lines)
    columns = "".join("r" if column.parts else "l" for column in table.columns)
    head = line(_latex(column.title) for column in table.columns)
    return (
        f"{notes}% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{columns}}}\n"
        f"  \\toprule\n{head}  \\midrule\n{body}  \\bottomrule\n\\end{{tabular}}\n"
    )


def to_rich(table: Table) -> RichTable:
    """The table for a terminal of 80 columns: two lines a method, the interval below its mean."""
    notes = "\n".join(table.notes)
    shown = RichTable(title=table.title, box=box.SIMPLE_HEAD, caption=notes, caption_justify="left", pad_edge=False)
    shown.padding, shown.collapse_padding = (0, 1), True
    numeric = [(number, column) for number, column in enumerate(table.columns) if column.parts and column.short]
    words = [number for number, column in enumerate(table.columns) if not column.parts]
    shown.add_column(", ".join(table.columns[number].short for number in words), min_width=20)
    for _, column in numeric:
        shown.add_column(escape(column.short), justify="right", no_wrap=True)
    for line in table.lines:
        name, *details = (line.cells[number].text for number in words)
        below = ", ".join(detail for detail in (*details, line.cells[words[0]].remark) if detail not in ("", "–"))
        first = escape(name) + (f"\n[dim]{escape(below)}[/]" if below else "")
        shown.add_row(first, *(_two_lines(line.cells[number]) for number, _ in numeric))
    return shown


def _two_lines(cell: Cell) -> str:
    mean, _, half = cell.text.partition(" ± ")
    below = f"±{half}" if half else cell.remark
    if not cell.numbers:
        mean, _, below = mean.partition(" ")
    return escape(mean) + (f"\n[dim]{escape(below)}[/]" if below else "")


def full_text(cell: Cell) -> str:
    """The cell with its remark."""
    return f"{cell.text} ({cell.remark})" if cell.remark else cell.text


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n\t]+", " ", text)


def _replacing(characters: Mapping[str, str]) -> Callable[[str], str]:
    table = str.maketrans(dict(characters))
    return lambda text: _one_line(text).translate(table)


escaped = _replacing({c: "\\" + c for c in "\\`*_[]|"} | {c: html.escape(c) for c in "<>&"})
"""Words as GitHub Markdown shows them, whatever signs they have."""
_latex = _replacing(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"±": r"$\pm$", "×": r"$\times$", "−": "$-$", "–": "--", "\u202f": r"\,"}
)
