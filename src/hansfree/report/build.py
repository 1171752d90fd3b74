"""The files of a report: report.html, and a suite's tables as Markdown, CSV and LaTeX.

The same folder gives the same page to the byte, but for what stands in elements marked ``data-time``.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hansfree.report import charts, detectors, sub_models, tables
from hansfree.report.audit import is_audit, write_audit_page
from hansfree.report.page import Page
from hansfree.report.results import Section, parts_of, shown_variants, variant_titles
from hansfree.report.roar import build_roar_report, is_roar
from hansfree.report.spelling import escaped, to_csv, to_latex, to_markdown
from hansfree.runs import RunFolder, SuiteFolder, open_folder, read_results, write_text


def build_report(folder: Path | str) -> Path:
    """Write report.html into a run, suite or audit folder, and a suite's tables beside it; return the page's path.

    Raises ``UserError`` where the folder is neither, or holds no readable results.json.
    """
    place = open_folder(folder)
    if is_audit(place.path):
        return write_audit_page(place.path)
    if is_roar(place.path):
        return build_roar_report(place.path)
    if isinstance(place, SuiteFolder):
        write_tables(place)
    write_text(place.report, render(place))
    return place.report


def write_tables(folder: SuiteFolder) -> None:
    """Write table.md, table.csv and table.tex from results.json, every variant in each."""
    spelt = [_spelt_tables(title, part) for title, part in parts_of(read_results(folder.results))]
    markdown, numbers, latex = zip(*spelt)
    write_text(folder.table("md"), "\n".join(markdown))
    write_text(folder.table("csv"), numbers[0] + "".join(text.partition("\n")[2] for text in numbers[1:]))
    write_text(folder.table("tex"), "\n".join(latex))


def _spelt_tables(title: str, results: Section) -> tuple[str, str, str]:
    """The tables as Markdown, CSV (all that was tried) and LaTeX, under the title of their condition."""
    shown = shown_variants(results)
    others = [variant for variant in variant_titles(results["cells"]) if variant not in shown]
    table, everything = tables.method_table(results, shown), tables.method_table(results)
    markdown, latex = to_markdown(table), to_latex(tables.paper_form(table))
    for further in tables.FURTHER:
        everything = tables.side_by_side(everything, further(results))
        if (more := further(results, shown)) is not None:
            markdown += f"\n## {more.title}\n\n{to_markdown(more)}"
            latex += f"\n% {more.title}\n{to_latex(more)}"
    if others:
        tried = tables.method_table(results, others)
        markdown += f"\n## Settings that were tried and not chosen\n\n{to_markdown(tried)}"
    for further in (*sub_models.TABLES, *detectors.TABLES):
        if (more := further(results, shown)) is not None:
            markdown += f"\n## {more.title}\n\n{to_markdown(more)}"
            latex += f"\n% {more.title}\n{to_latex(more)}"
    markdown += "".join(f"\n{escaped(sentence)}\n" for sentence in sub_models.verdicts(results, shown))
    if title:
        markdown, latex = f"## {title}\n\n{markdown}", f"% {title}\n{latex}"
    return markdown, to_csv(everything), latex


def render(place: RunFolder | SuiteFolder) -> str:
    """The page as text."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(mark=charts.legend_mark, bar=charts.colour_bar_uri(), bins=charts.BINS)
    style = Markup((here / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja").render(page=Page(place), style=style)
