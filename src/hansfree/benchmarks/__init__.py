"""Data by name, most of them with a known shortcut."""

from hansfree.benchmarks.accessories import Accessories
from hansfree.benchmarks.coloured_digits import ColouredDigits
from hansfree.benchmarks.folder import Folder
from hansfree.benchmarks.mnist_background import MNISTBackground
from hansfree.benchmarks.objects_on_scenes import ObjectsOnScenes
from hansfree.benchmarks.plain_digits import PlainDigits
from hansfree.core import Benchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "coloured-digits": ColouredDigits,
    "mnist-background": MNISTBackground,
    "objects-on-scenes": ObjectsOnScenes,
    "accessories": Accessories,
    "folder": Folder,
    "digits": PlainDigits,
}

__all__ = ["BENCHMARKS", "Accessories", "ColouredDigits", "Folder", "MNISTBackground", "ObjectsOnScenes", "PlainDigits"]
