"""
Load weights from anywhere, and write checkpoints. From a name to a model::

    path, URL, or name in a model zoo
      find_file      fetching.py       -> a file on this machine
      read_file      reading.py        -> what it contains, read as data; pickles.py runs no code
      read_weights   conversion.py     -> Weights: parameters with Detectron2's names; sources.py
                                          has a table for each framework
      compare        compatibility.py  -> Fit: what the file lacks and what the model does not
                                          take; misfit says why it cannot be used
      MaskScoringCheckpointer.load     -> the model

`writing.py` writes weights to files of their own, for `msrcnn-d2 convert`.
"""

from .checkpointer import MaskScoringCheckpointer

__all__ = ["MaskScoringCheckpointer"]
