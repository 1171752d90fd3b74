"""How far the variants of a finished suite are from any one of them, paired by seed: what its own tables leave out.

    python bench/differences.py runs/fashion-alpha-temperature kd-0.9-t1 acc entropy_category

A line for each other variant and number of that metric: mean difference with the 95 % Student t interval and the p of a
paired t-test, in the metric's own unit (accuracies as shares), and what the number is of.
"""

import sys
from pathlib import Path

from hansfree.errors import unknown
from hansfree.report.results import parts_of
from hansfree.report.statistics import summarise
from hansfree.report.wording import p_value
from hansfree.runs import SuiteFolder, read_results


def main(suite: str, reference: str, *metrics: str) -> None:
    """Print the differences from ``reference`` in the suite in the folder ``suite``."""
    for title, part in parts_of(read_results(SuiteFolder(Path(suite)).results)):
        variants = {cell["variant"] for cell in part["cells"]}
        if reference not in variants:
            raise SystemExit(str(unknown("variant", reference, variants)))
        rows = [row for row in part["rows"] if row["metric"] in metrics and row["model"] == "student"]
        whats = {(row["split"], row["group"], row.get("tier"), row.get("measured_with")) for row in rows}
        for what in sorted(whats, key=str):
            told = " ".join(str(word) for word in (title, *what) if word)
            same = [r for r in rows if (r["split"], r["group"], r.get("tier"), r.get("measured_with")) == what]
            for found in summarise(same, reference):
                if found.comparison and found.variant != reference:
                    mean, half = found.comparison.difference.mean, found.comparison.difference.half or 0.0
                    spread = f"{mean:+.4f} ± {half:.4f} {p_value(found.comparison.p)}"
                    print(f"{found.variant:24} {found.metric:24} {spread:32} {told}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit("Name the folder of a suite, a variant and at least one metric.")
    main(*sys.argv[1:])
