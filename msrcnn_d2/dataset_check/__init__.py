"""Check a dataset in COCO's format, and write a copy that is fixed."""

from .check import check_dataset
from .fix import Change, Fixed, fix_dataset
from .issues import Finding, Findings, Fix, Level

__all__ = [
    "Change",
    "Finding",
    "Findings",
    "Fix",
    "Fixed",
    "Level",
    "check_dataset",
    "fix_dataset",
]
