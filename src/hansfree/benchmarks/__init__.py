"""Data with a known shortcut, by name."""

from hansfree.benchmarks.coloured_digits import ColouredDigits
from hansfree.core import Benchmark

BENCHMARKS: dict[str, type[Benchmark]] = {"coloured-digits": ColouredDigits}

__all__ = ["BENCHMARKS", "ColouredDigits"]
