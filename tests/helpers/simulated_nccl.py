"""
One of two processes of a job on GPUs, each with its own, which talk by NCCL.

Where there are not two GPUs, they are simulated, and so is NCCL: gloo exchanges the values, but
what NCCL refuses is refused, and :class:`SimulatedDDP` averages gradients. It cannot show
deadlocks between streams, timeouts, and the order in which NCCL adds.
"""

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from detectron2.utils import comm

from msrcnn_d2.engine.launch import launch_processes
from tests.helpers import simulated_cuda
from tests.helpers.many_processes import train_and_keep
from tests.helpers.simulated_cuda import SimulatedCuda, SimulatedTensor

NUM_GPUS = 2
REAL = torch.cuda.device_count() >= NUM_GPUS
COLLECTIVES = ("all_gather", "all_reduce", "broadcast", "gather", "reduce", "scatter")
BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)


class SimulatedNCCL:
    """
    Stands in for the functions of torch.distributed.

    Attributes:
        collectives: what was called, with the kind of its group: ("all_reduce", "nccl").
    """

    def __init__(self):
        self.collectives: list[tuple[str, str]] = []
        self._gloo_groups: set = set()
        self._device: int | None = None
        names = ("init_process_group", "new_group", "barrier", *COLLECTIVES)
        self._real = {name: getattr(dist, name) for name in names}

    @contextlib.contextmanager
    def running(self):
        """In this block torch.distributed and torch.cuda are as on a machine of two GPUs."""
        functions = {name: self._collective(name) for name in COLLECTIVES}
        for name in ("init_process_group", "new_group", "barrier", "get_backend"):
            functions[name] = getattr(self, name)
        gpus = {
            "device_count": lambda: NUM_GPUS,
            "set_device": self.set_device,
            "current_device": lambda: self._device or 0,
            "get_device_properties": lambda k: SimpleNamespace(uuid=f"simulated GPU {k}"),
        }
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(dist, **functions))
            stack.enter_context(mock.patch.multiple(torch.cuda, **gpus))
            for module in list(sys.modules.values()):  # many import its name
                if vars(module).get("DistributedDataParallel") is DistributedDataParallel:
                    stack.enter_context(
                        mock.patch.object(module, "DistributedDataParallel", SimulatedDDP)
                    )
            yield self

    def set_device(self, device: int) -> None:
        self._device = device

    def init_process_group(self, backend=None, **kwargs):
        if backend != "nccl":
            raise ValueError(f"GPUs talk by NCCL, not by {backend}")
        self._real["init_process_group"](backend="gloo", **kwargs)
        devices: list = [None] * dist.get_world_size()
        dist.all_gather_object(devices, self._device)
        if None in devices or len(set(devices)) < len(devices):
            raise RuntimeError(f"Duplicate GPU detected: the processes have set {devices}")

    def new_group(self, ranks=None, *args, backend=None, **kwargs):
        group = self._real["new_group"](ranks, *args, backend="gloo", **kwargs)
        if backend == "gloo":
            self._gloo_groups.add(group)
        return group

    def get_backend(self, group=None) -> str:
        return "gloo" if group in self._gloo_groups else "nccl"

    def barrier(self, group=None, async_op=False, device_ids=None):
        if self.get_backend(group) == "nccl" and device_ids is None:
            raise RuntimeError("barrier: no device is named, so NCCL guesses one and warns")
        return self._real["barrier"](group)

    def _collective(self, name):
        def call(*args, group=None, **kwargs):
            backend = self.get_backend(group)
            self._check(tree_leaves((args, kwargs)), backend)
            self.collectives.append((name, backend))
            values, options = tree_map(value_of, (args, kwargs))
            return self._real[name](*values, group=group, **options)

        return call

    def _check(self, given, backend):
        for x in given:
            if backend == "nccl" and any(x is op for op in BITWISE):
                raise ValueError(f"Cannot use {x} with NCCL")
            if not isinstance(x, torch.Tensor):
                continue
            if x.is_cuda != (backend == "nccl"):
                raise RuntimeError(f"a tensor on {x.device} was given to a group of {backend}")
            if backend == "nccl" and not x.is_contiguous():
                raise ValueError("Tensors must be contiguous")


def value_of(x):
    return x.value if isinstance(x, SimulatedTensor) else x


class SimulatedDDP(nn.Module):
    """
    Stands in for DistributedDataParallel, which looks into tensors below Python: starts all
    processes with the weights and buffers of the first, and averages gradients once all are there.
    """

    def __init__(self, module, device_ids=None, broadcast_buffers=True, **kwargs):
        super().__init__()
        state = [*module.parameters(), *module.buffers()]
        if device_ids != [torch.cuda.current_device()] or not all(x.is_cuda for x in state):
            raise ValueError(f"the module has to be on the one device of {device_ids}")
        self.module = module
        self.broadcast_buffers = broadcast_buffers
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._waiting: set[int] = set()
        for x in state:
            dist.broadcast(x.detach(), src=0)
        for p in self._trained:
            p.register_post_accumulate_grad_hook(self._accumulated)

    def forward(self, *args, **kwargs):
        if self._waiting:
            raise RuntimeError("Expected to have finished reduction in the prior iteration")
        if self.training and torch.is_grad_enabled():
            self._waiting = {id(p) for p in self._trained}
            for x in self.module.buffers() if self.broadcast_buffers else ():
                dist.broadcast(x, src=0)
        return self.module(*args, **kwargs)

    def _accumulated(self, parameter):
        self._waiting.discard(id(parameter))
        if not self._waiting:
            for p in self._trained:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


def mistakes() -> dict:
    """What NCCL and DDP refuse."""

    def two_steps_without_all_gradients():
        model = SimulatedDDP(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]).cuda(), own)
        model.module.forward = lambda x: model.module[0](x)
        model(torch.ones(1, 2, device="cuda")).sum().backward()
        model(torch.ones(1, 2, device="cuda"))

    rank, gloo = comm.get_local_rank(), comm._get_global_gloo_group()
    own = [rank]
    matrix = torch.ones(2, 3, device="cuda")
    partly = nn.Linear(2, 2).cuda()
    partly.register_buffer("on_cpu", torch.ones(1))
    return {
        "a CPU tensor": lambda: dist.all_reduce(torch.ones(1)),
        "a CPU tensor to gather into": lambda: dist.all_gather([torch.ones(2, 3)] * 2, matrix),
        "a GPU's tensor for gloo": lambda: dist.all_reduce(matrix, group=gloo),
        "a transposed tensor": lambda: dist.broadcast(matrix.t(), src=0),
        "a bitwise operation": lambda: dist.all_reduce(matrix, dist.ReduceOp.BOR),
        "a barrier without a device": lambda: dist.barrier(),
        "a buffer on the CPU": lambda: SimulatedDDP(partly, own),
        "another process's GPU": lambda: SimulatedDDP(nn.Linear(2, 2).cuda(), [1 - rank]),
        "a parameter without a gradient": two_steps_without_all_gradients,
    }


def refused() -> dict[str, bool]:
    """For each mistake whether it raises."""
    found = {}
    for name, mistake in mistakes().items():
        try:
            mistake()
            found[name] = False
        except (RuntimeError, ValueError):
            found[name] = True
    return found


def run_rank(folder: Path, options: list[str]) -> None:
    """The process, started with the variables that torchrun sets."""
    with contextlib.ExitStack() as stack:
        nccl = None
        if not REAL:
            simulated_cuda.DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            stack.enter_context(SimulatedCuda().running())
            nccl = stack.enter_context(SimulatedNCCL().running())
        launch_processes(_keep, NUM_GPUS, args=(nccl, folder, options))


def _keep(nccl, folder, options):
    kept: dict = {}
    if nccl is not None:
        kept["refused"] = refused()
        nccl.collectives.clear()
    kept["run"] = train_and_keep([*options, "train.device=cuda"], folder)
    if nccl is not None:
        kept["collectives"] = Counter(nccl.collectives)
    torch.save(kept, folder / f"rank_{comm.get_rank()}.pth")
