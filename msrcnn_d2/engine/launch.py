"""Start one process or many: spawned here, or already started by torchrun."""

import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..errors import UserError

__all__ = ["launch"]


def launch(
    main: Callable,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    args: tuple = (),
) -> None:
    """
    Call `main(*args)` in each process of a job. Detectron2's `launch` in three more places: on
    CPUs (with gloo), under torchrun and other launchers that set RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT (SLURM's too), and with the exit code of a process that failed.

    Args:
        num_processes: per machine, one for each GPU. Launchers that set RANK decide themselves.
        num_machines, machine_rank, dist_url: as in Detectron2's `launch`.
        device: "cuda" or "cpu".
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _run(
            main,
            args,
            device=device,
            init_method="env://",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
    elif num_machines * num_processes == 1:
        main(*args)
    else:
        _spawn(main, num_processes, num_machines, machine_rank, dist_url, device, args)


def _spawn(main, num_processes, num_machines, machine_rank, dist_url, device, args):
    if device.startswith("cuda") and num_processes > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {num_processes}, but this machine has {torch.cuda.device_count()}."
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise UserError("--dist-url auto works on one machine; give tcp://HOST:PORT for more.")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    worker_args = (main, num_processes, num_machines, machine_rank, dist_url, device, args)
    try:
        mp.spawn(_spawned, nprocs=num_processes, args=worker_args)
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)  # the process has said why


def _spawned(local_rank, main, num_processes, num_machines, machine_rank, dist_url, device, args):
    _run(
        main,
        args,
        device=device,
        init_method=dist_url,
        rank=machine_rank * num_processes + local_rank,
        world_size=num_machines * num_processes,
        local_rank=local_rank,
        local_size=num_processes,
    )


def _run(main, args, *, device, init_method, rank, world_size, local_rank, local_size):
    use_cuda = device.startswith("cuda")
    if use_cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=DEFAULT_TIMEOUT,
    )
    _create_local_process_group(local_size)
    comm.synchronize()
    main(*args)
    dist.destroy_process_group()


def _create_local_process_group(local_size: int) -> None:
    """The group of a machine's processes, which Detectron2 0.6 makes in its own `launch` only."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
        return
    for first in range(0, dist.get_world_size(), local_size):
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
