"""
Checkpoints: find them (`fetching.py`), read them safely (`reading.py`, `pickles.py`), give their
parameters Detectron2's names (`names.py`: a table for each framework; `conversion.py`), see
whether they fit a model (`fitting.py`), load them (`checkpointer.py`), and write them
(`writing.py`).

`python -m msrcnn_d2.checkpoint IN OUT` converts a file once.
"""

from .checkpointer import MaskScoringCheckpointer

__all__ = ["MaskScoringCheckpointer"]
