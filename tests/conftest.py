import importlib.metadata
import os
import platform

import pytest
import torch

import detectron2
from detectron2.config import instantiate
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from tests.helpers.command import leaving_no_traces
from tests.helpers.toy import tiny_mask_scoring_rcnn
from tests.helpers.weights import slim_model

torch.set_num_threads(1)  # toy tensors: more threads only wait for each other


# What a test may depend on
PACKAGES = (
    *("torch", "torchvision", "fvcore", "numpy", "pycocotools", "faster-coco-eval"),
    *("omegaconf", "opencv-python-headless", "pillow", "hypothesis", "pytest"),
)


def pytest_terminal_summary(terminalreporter):
    """What the tests ran with: at the end, since the header is not for quiet runs."""
    found = {x.metadata["Name"]: x.version for x in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {found.get(name, 'is missing')}" for name in PACKAGES)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    terminalreporter.section("ran with")
    terminalreporter.line(
        f"Python {platform.python_version()}, {detectron2_version(found)}, {versions}"
    )
    terminalreporter.line(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gpu}"
    )


def detectron2_version(found: dict) -> str:
    """Its main branch calls itself 0.6, too; the parts that only it has tell them apart."""
    if hasattr(comm, "create_local_process_group"):
        return "Detectron2 after 0.6 (main branch)"
    return f"Detectron2 {found.get('detectron2', detectron2.__version__)}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def leave_no_traces():
    with leaving_no_traces():
        yield


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
