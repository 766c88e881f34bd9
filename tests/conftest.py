import pytest
import torch

from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from toy import tiny_mask_scoring_rcnn
from weights import slim_model

torch.set_num_threads(1)  # toy tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
