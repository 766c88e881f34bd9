"""Counts, lists and values in messages."""

import json
import reprlib
from collections.abc import Sequence
from typing import Any

__all__ = ["listed", "plural", "shown"]


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun, such as "1,200 images"; `nouns` is an irregular plural."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names and the number of the others, such as "a, b, c and 4 more"."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def shown(value: Any) -> str:
    """A value from a file, which may be anything, on one line and shortened; text is quoted."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
