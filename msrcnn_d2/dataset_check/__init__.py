"""Check a dataset in COCO's format, and write a copy that is fixed."""

from .check import check_dataset
from .fix import Fixed, fix_dataset
from .issues import Finding, Findings, Level

__all__ = ["Finding", "Findings", "Fixed", "Level", "check_dataset", "fix_dataset"]
