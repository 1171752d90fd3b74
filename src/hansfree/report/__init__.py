"""The report: one self-contained page from a run or suite folder. Reads folders; knows nothing of training."""

from hansfree.report.build import build_report

__all__ = ["build_report"]
