"""Frozen explanations: a teacher's logits and maps on disk, replayed as the images are augmented.

A *frozen* teacher answers about each image as it stands in its data set, once. Where the image is then cropped or
flipped, its map goes the same way, and its logits stay (Parchami-Araghi et al., "Good teachers explain", 2024,
https://arxiv.org/abs/2402.03119, section 3.3). The answers only approximate those about the augmented image, and cost
next to nothing.

A store is a folder: ``meta.json`` says whose answers it holds, about which data, and the SHA-256 of every file; each
split has fixed-stride ``.npy`` shards, read by memory map, whose rows are the positions in that split; the teacher's
last layer is beside them. ``hansfree store make`` writes it and ``teacher: {store: PATH}`` reads it.
"""

from hansfree.store.answers import Marked, StoredTeacher, open_store
from hansfree.store.files import DTYPES, Dtype, Store

__all__ = ["DTYPES", "Dtype", "Marked", "Store", "StoredTeacher", "open_store"]
