import logging

import pytest
import torch

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from toy import tiny_mask_scoring_rcnn
from weights import slim_model

torch.set_num_threads(1)  # toy tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def leave_no_traces():
    """Forget datasets and log files: a process of its own would."""
    known = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "msrcnn_d2"):
        for handler in logging.getLogger(name).handlers[:]:
            logging.getLogger(name).removeHandler(handler)
            handler.close()


@pytest.fixture
def event_storage():
    with EventStorage() as storage:
        yield storage


@pytest.fixture(scope="module")
def slim():
    return slim_model()


@pytest.fixture(scope="module")
def plain():
    """The Mask R-CNN without a mask IoU head."""
    return slim_model("MODEL.ROI_HEADS.NAME", "StandardROIHeads")


@pytest.fixture
def tiny():
    return instantiate(tiny_mask_scoring_rcnn().model)
