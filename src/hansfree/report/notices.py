"""What a reader must know before believing a number: runs that failed, runs that are flagged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hansfree.report.results import NOT_APPLICABLE, Section


@dataclass(frozen=True)
class Notice:
    """Something that a reader must know before believing a number."""

    about: str
    text: str
    detail: str = ""


def failures(cells: Sequence[Section], titles: Mapping[str, str]) -> Iterator[Notice]:
    """Runs that did not end well, and why."""
    said: dict[str, list[tuple[int, str]]] = {}
    for cell in cells:
        if cell.get("status") not in ("done", NOT_APPLICABLE):
            reason = (cell.get("error") or "no reason was recorded").strip()
            said.setdefault(cell["variant"], []).append((cell["seed"], f"{cell.get('status')}: {reason}"))
    return _grouped(said, titles)


def flags(cells: Sequence[Section], titles: Mapping[str, str]) -> Iterator[Notice]:
    """What the runs themselves warn of."""
    said: dict[str, list[tuple[int, str]]] = {}
    for cell in cells:
        for text in cell.get("warnings") or []:
            said.setdefault(cell["variant"], []).append((cell["seed"], text))
    return _grouped(said, titles)


def _grouped(said: Mapping[str, list[tuple[int, str]]], titles: Mapping[str, str]) -> Iterator[Notice]:
    """One notice for variants that say the same in the same seeds, in full where seeds say different things."""
    alike: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for variant, texts in said.items():
        alike.setdefault(tuple(texts), []).append(titles[variant])
    for texts, variants in alike.items():
        seeds = list(dict.fromkeys(seed for seed, _ in texts))
        about = f"{'; '.join(variants)}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
        first, *_ = lines = texts[0][1].splitlines()
        # A traceback names the error in its last line.
        summary = f"{first} … {lines[-1]}" if len(lines) > 1 else first
        same = len({text for _, text in texts}) == 1
        detail = "" if same and len(lines) == 1 else "\n".join(f"seed {seed}: {text}" for seed, text in texts)
        yield Notice(about, summary, detail)
