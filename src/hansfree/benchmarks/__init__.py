"""Data with a known shortcut, by name."""

from hansfree.benchmarks.coloured_digits import ColouredDigits
from hansfree.benchmarks.mnist_background import MNISTBackground
from hansfree.core import Benchmark

BENCHMARKS: dict[str, type[Benchmark]] = {"coloured-digits": ColouredDigits, "mnist-background": MNISTBackground}

__all__ = ["BENCHMARKS", "ColouredDigits", "MNISTBackground"]
