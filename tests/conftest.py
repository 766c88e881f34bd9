import pytest
import torch

from detectron2.utils.events import EventStorage

torch.set_num_threads(1)  # toy tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def event_storage():
    with EventStorage() as storage:
        yield storage
