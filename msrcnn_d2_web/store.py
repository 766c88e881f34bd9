"""The analyses of all users, each under a secret key."""

import secrets
import threading
from collections import OrderedDict

from .analysis import Analysis

__all__ = ["AnalysisStore"]


class AnalysisStore:
    """
    Keeps analyses in memory. Who knows the key of an analysis may see it: a key cannot be guessed,
    and only the user who uploaded the image gets it.

    When there is too much, those go that nobody has looked at for the longest time.
    """

    def __init__(self, max_bytes: int = 2**30):
        self._max_bytes = max_bytes
        self._analyses: OrderedDict[str, Analysis] = OrderedDict()  # the last one is in use
        self._lock = threading.Lock()

    def add(self, analysis: Analysis) -> str:
        """Keep an analysis; returns its key."""
        key = secrets.token_urlsafe(24)
        with self._lock:
            self._analyses[key] = analysis
            used = sum(x.nbytes for x in self._analyses.values())
            while used > self._max_bytes and len(self._analyses) > 1:
                used -= self._analyses.popitem(last=False)[1].nbytes
        return key

    def get(self, key: str | None) -> Analysis | None:
        """The analysis with this key, or None if there is none, or none any more."""
        with self._lock:
            if key is None or key not in self._analyses:
                return None
            self._analyses.move_to_end(key)
            return self._analyses[key]
