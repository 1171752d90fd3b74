"""Data by name, most of them with a known shortcut."""

from hansfree.benchmarks.accessories import Accessories
from hansfree.benchmarks.cells import CellImages
from hansfree.benchmarks.chest_x_ray import ChestXRay
from hansfree.benchmarks.coco_on_places import CocoOnPlaces
from hansfree.benchmarks.coloured_digits import ColouredDigits
from hansfree.benchmarks.corrupted_images import CorruptedImages
from hansfree.benchmarks.digits_many_shortcuts import DigitsManyShortcuts
from hansfree.benchmarks.dogs_with_ties import DogsWithTies
from hansfree.benchmarks.film_reviews import FilmReviews
from hansfree.benchmarks.folder import Folder
from hansfree.benchmarks.folder_with_accessories import FolderWithAccessories
from hansfree.benchmarks.labelled_names import BAR, BFFHQ
from hansfree.benchmarks.many_objects import ManyObjects
from hansfree.benchmarks.masked_pixels import MaskedPixels
from hansfree.benchmarks.mnist_background import MNISTBackground
from hansfree.benchmarks.objects_on_scenes import ObjectsOnScenes
from hansfree.benchmarks.pascal_voc import PascalVOC
from hansfree.benchmarks.plain_digits import PlainDigits
from hansfree.benchmarks.sst import SST
from hansfree.benchmarks.sun397 import SUN397
from hansfree.benchmarks.waterbirds import Waterbirds
from hansfree.core import Benchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "coloured-digits": ColouredDigits,
    "mnist-background": MNISTBackground,
    "digits-many-shortcuts": DigitsManyShortcuts,
    "corrupted-images": CorruptedImages,
    "objects-on-scenes": ObjectsOnScenes,
    "many-objects": ManyObjects,
    "accessories": Accessories,
    "coco-on-places": CocoOnPlaces,
    "dogs-with-ties": DogsWithTies,
    "waterbirds": Waterbirds,
    "bffhq": BFFHQ,
    "bar": BAR,
    "chest-x-ray": ChestXRay,
    "pascal-voc": PascalVOC,
    "sun397": SUN397,
    "folder": Folder,
    "folder-with-accessories": FolderWithAccessories,
    "digits": PlainDigits,
    "cells": CellImages,
    "masked-pixels": MaskedPixels,
    "film-reviews": FilmReviews,
    "sst": SST,
}

__all__ = [
    "BAR",
    "BENCHMARKS",
    "BFFHQ",
    "SST",
    "SUN397",
    "Accessories",
    "CellImages",
    "ChestXRay",
    "CocoOnPlaces",
    "ColouredDigits",
    "CorruptedImages",
    "DigitsManyShortcuts",
    "DogsWithTies",
    "FilmReviews",
    "Folder",
    "FolderWithAccessories",
    "MNISTBackground",
    "ManyObjects",
    "MaskedPixels",
    "ObjectsOnScenes",
    "PascalVOC",
    "PlainDigits",
    "Waterbirds",
]
