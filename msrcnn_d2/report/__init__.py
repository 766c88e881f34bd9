"""A report that shows what the mask scores of a model are worth."""

from .page import write_report

__all__ = ["write_report"]
