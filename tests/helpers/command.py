"""The command `msrcnn-d2`, run in the process of the tests."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger

from msrcnn_d2_cli import main


def exit_code(*args: object) -> int:
    """
    Args:
        args: the command, such as "convert", and its arguments.
    """
    try:
        return main([str(a) for a in args])
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


@contextmanager
def leaving_no_traces() -> Iterator[None]:
    """Forget datasets and log files: a process of its own would."""
    known = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    setup_logger.cache_clear()
    for name in [*logging.root.manager.loggerDict]:
        package, _, module = name.partition(".")
        if package in ("detectron2", "fvcore", "msrcnn_d2"):
            logger = logging.getLogger(name)
            if module:  # `msrcnn-d2 export` shows some of the modules only
                logger.propagate = True
            for handler in logger.handlers[:]:
                logger.removeHandler(handler)
                handler.close()
