from .check import check_dataset
from .findings import Finding, Findings, Level

__all__ = ["Finding", "Findings", "Level", "check_dataset"]
