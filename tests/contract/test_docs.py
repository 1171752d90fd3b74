"""What the documentation shows runs, and what is generated from the code is up to date.

On a page, Python blocks run in order in one namespace. In the how-tos, a block whose first line is a comment with a
file's name is written to that file first, and commands run.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from hansfree import cli
from hansfree.listing import method_cards
from hansfree.plan import read_suite
from hansfree.runs import SuiteFolder
from hansfree.suite import cells_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([DOCS / "tour.md", DOCS / "lrp-semantics.md", *DOCS.glob("how-to/*.md"), *DOCS.glob("benchmarks/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
FILE = re.compile(r"# (\w+\.(?:py|yaml))\n")


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page):
    """The commands of a page: lists of words, without comments."""
    lines = [line for kind, text in blocks(page) if kind == "sh" for line in text.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words[:1] == ["hansfree"] or words[:3] == ["python", "-m", "hansfree"]]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in [name for name in sys.modules if name not in known and name.startswith("my_")]:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, workplace, monkeypatch):
    namespace = {"__name__": page.stem}
    for kind, text in blocks(page):
        named = FILE.match(text)
        if named:
            (workplace / named[1]).write_text(text, encoding="utf-8")
        if kind == "python":
            exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), namespace)
        if kind == "sh" and page.parent.name == "how-to":
            for line in text.splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True)[2:])
                with pytest.raises(SystemExit) as stop:
                    cli.main()
                assert not stop.value.code, line


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page):
    verbs = get_command(cli.app).commands
    for words in commands(page):
        verb, *rest = words[words.index("hansfree") + 1 :]
        command = verbs[verb].commands[rest[0]] if hasattr(verbs[verb], "commands") else verbs[verb]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, words


def test_suites_that_are_shown_can_be_read(workplace):
    shown = [text for page in PAGES for kind, text in blocks(page) if kind == "yaml" and "variants:" in text]
    assert shown
    for text in shown:
        assert cells_of(read_suite(yaml.safe_load(text)), SuiteFolder(workplace))


def test_method_cards_are_those_of_the_code():
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == method_cards(), "run: make docs"


def test_decisions_are_numbered_without_gaps():
    pages = sorted((DOCS / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        assert {"## Context", "## Decision", "## Consequence"} <= set(page.read_text(encoding="utf-8").splitlines())
