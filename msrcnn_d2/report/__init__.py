"""A report on how well scores tell good masks from bad ones, and on the AP that they give."""

from .page import write_report

__all__ = ["write_report"]
