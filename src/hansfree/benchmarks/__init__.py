"""Data with a known shortcut, by name."""

from hansfree.benchmarks.accessories import Accessories
from hansfree.benchmarks.coloured_digits import ColouredDigits
from hansfree.benchmarks.mnist_background import MNISTBackground
from hansfree.benchmarks.objects_on_scenes import ObjectsOnScenes
from hansfree.core import Benchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "coloured-digits": ColouredDigits,
    "mnist-background": MNISTBackground,
    "objects-on-scenes": ObjectsOnScenes,
    "accessories": Accessories,
}

__all__ = ["BENCHMARKS", "Accessories", "ColouredDigits", "MNISTBackground", "ObjectsOnScenes"]
