"""The simulated device itself: what it computes, refuses, waits for, casts and counts."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from tests.helpers.simulated_cuda import SimulatedCuda


@pytest.fixture
def device():
    with SimulatedCuda().running() as device:
        yield device


def on_gpu(*values):
    return torch.tensor(values).to("cuda")


def test_values_and_gradients_are_those_of_the_cpu(device):
    torch.manual_seed(0)
    cpu = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    gpu, x = copy.deepcopy(cpu).to("cuda"), torch.rand(2, 3, 8, 8)
    cpu(x).square().mean().backward()
    gpu(x.to("cuda")).square().mean().backward()
    for a, b in zip(cpu.parameters(), gpu.parameters(), strict=True):
        assert b.is_cuda and b.grad.is_cuda and str(b.device) == "cuda:0"
        assert torch.equal(a.grad, b.grad.cpu())


def test_outside_of_the_block_there_is_no_device():
    available = torch.cuda.is_available()
    with SimulatedCuda().running():
        assert torch.cuda.is_available()
        x = on_gpu(1.0)
    assert torch.cuda.is_available() == available
    with pytest.raises(RuntimeError, match="no simulation"):
        x + 1


MISTAKES = {
    "CPU operand": lambda: on_gpu(1.0, 2.0) + torch.ones(2),
    "one element on the CPU": lambda: on_gpu(1.0, 2.0) * torch.tensor([1.0]),
    "concatenated with a CPU tensor": lambda: torch.cat([on_gpu(1.0), torch.ones(1)]),
    "stacked with a CPU tensor": lambda: torch.stack([on_gpu(1.0), torch.ones(1)]),
    "CPU indices to gather": lambda: on_gpu(1.0, 2.0).gather(0, torch.tensor([1])),
    "CPU condition": lambda: torch.where(torch.tensor([True]), on_gpu(1.0), on_gpu(2.0)),
    "CPU weights": lambda: F.linear(on_gpu(1.0, 2.0), torch.ones(3, 2)),
    "CPU tensor indexed by a CUDA one": lambda: torch.ones(3)[on_gpu(0, 1)],
    "CPU tensor indexed by a CUDA mask": lambda: torch.ones(2)[on_gpu(True, False)],
    "CPU values into a CUDA tensor": lambda: on_gpu(1.0, 2.0).index_put_(
        (on_gpu(0, 1),), torch.ones(2)
    ),
    "CUDA values into a CPU tensor": lambda: torch.ones(2).add_(on_gpu(1.0)[0]),
    "CUDA values indexed into a CPU tensor": lambda: torch.ones(2).index_put_(
        (torch.tensor([0]),), on_gpu(1.0)
    ),
    "CPU boxes": lambda: roi_align(
        torch.ones(1, 1, 4, 4).to("cuda"), torch.tensor([[0.0, 0, 0, 2, 2]]), 2
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mixed_devices_are_refused(device, mistake):
    with pytest.raises(RuntimeError, match="device|cpu"):
        mistake()


@pytest.mark.parametrize("convert", [lambda x: x.numpy(), np.asarray], ids=["numpy", "asarray"])
def test_numpy_is_refused(device, convert):
    with pytest.raises(TypeError, match="Tensor.cpu"):
        convert(on_gpu(1.0))


WAITS = {
    "item": lambda x: x[0].item(),
    "condition": lambda x: bool(x.isfinite().all()),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "boolean index": lambda x: x[x > 1],
    "to the host": lambda x: x.cpu(),
    "list": lambda x: x.tolist(),
    "copied into": lambda x: torch.zeros(2).copy_(x),
    "from the host": lambda x: torch.ones(2).to("cuda"),
    "CPU indices": lambda x: x[torch.tensor([0])],
    "nms": lambda x: nms(torch.stack([x, x, x + 1, x + 1], dim=1), x, 0.5),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_each_wait_is_one_event(device, wait):
    x = on_gpu(1.0, 2.0)
    device.events.clear()
    wait(x)
    assert len(device.events) == 1, device.events


def test_the_place_of_an_event_is_the_innermost_line_of_a_project(device):
    x = on_gpu(1.0, 2.0)
    source = "def own(function):\n    return function()\n"
    ours, theirs = {}, {}
    exec(compile(source, "/any/msrcnn_d2/a/b.py", "exec"), ours)
    exec(compile(source, "/any/detectron2/c.py", "exec"), theirs)
    ours, theirs = ours["own"], theirs["own"]
    device.events.clear()
    x.sum().item()
    ours(lambda: theirs(x.sum().item))
    theirs(lambda: ours(x.sum().item))
    assert [event.place for event in device.events] == [
        "elsewhere",
        "detectron2/c.py:2 own",
        "msrcnn_d2/a/b.py:2 own",
    ]


def test_what_does_not_wait_is_no_event(device):
    x = on_gpu(1.0, 2.0)
    device.events.clear()
    y = (x + 1) * torch.tensor(2.0)  # a number of the CPU goes along with the kernel
    y[1:] = 0
    torch.where(y > 0, y, x)[y.argsort()].sum()
    torch.zeros(2, device="cuda")
    assert device.events == []
    assert y.tolist() == [4, 0]


def test_autocast_chooses_types_as_on_cuda(device):
    x = torch.rand(1, 1, 4, 4).to("cuda")
    boxes = torch.tensor([[0.0, 0, 0, 2, 2]]).to("cuda")
    with torch.autocast("cuda"):
        y = F.conv2d(x, torch.ones(1, 1, 1, 1).to("cuda"))
        assert y.dtype == torch.float16
        assert F.relu(y).dtype == y.sigmoid().dtype == roi_align(y, boxes, 2).dtype == y.dtype
        assert y.exp().dtype == y.sum().dtype == torch.float32
        assert torch.cat([x, y]).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_memory_is_counted_by_storage():
    with SimulatedCuda(track_memory=True).running() as device:
        x = device.empty(1000)  # 4000 bytes, in blocks of 512
        assert device.live == 4096
        y = x + 1
        view = y[10:]  # noqa: F841  shares y's storage
        assert device.live == 8192
        del x
        assert (device.live, device.peak) == (4096, 8192)
        del y, view
        assert device.live == 0
