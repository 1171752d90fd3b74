"""What the README shows runs, and the figures it states are those of docs/results."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_block_runs_and_the_gradient_reaches_every_weight():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert all(p.grad is not None for p in namespace["student"].parameters() if p.requires_grad)


def test_the_demo_table_is_the_recorded_one():
    (shown,) = re.findall(r"<!-- demo table: begin -->\n(.*?)<!-- demo table: end -->", README, re.S)
    recorded = (ROOT / "docs" / "results" / "coloured-digits" / "table.md").read_text(encoding="utf-8")
    first, _, _ = recorded.partition("\n## ")
    cells = {line.split("|")[1].strip(): line for line in first.splitlines() if line.startswith("|")}
    rows = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("|")][2:]
    assert rows
    for method, *numbers in rows:
        for number in numbers:
            assert number.strip() in cells[method.strip()]


def test_every_linked_file_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
