"""Audits: measures that look at a network many times over, each with a folder of its own that it can go on from."""

from hansfree.audits.dissection import dissect

__all__ = ["dissect"]
