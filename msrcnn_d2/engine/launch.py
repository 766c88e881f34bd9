"""Start one process or many: spawned here, or already started by torchrun."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..utils.errors import UserError
from .hooks import stop_signals_handled

__all__ = ["launch_processes"]

# The variables that torchrun sets for each process, beside RANK
LAUNCHER_VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_processes(
    main: Callable,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    args: tuple = (),
) -> None:
    """
    Call `main(*args)` in each process of a job.

    Unlike Detectron2's `launch` it also works on CPUs (with gloo) and under torchrun or another
    launcher that sets its variables, and it exits with the exit code of a process that failed.

    Args:
        num_processes: per machine, one for each GPU. Ignored if a launcher has set RANK.
        num_machines, machine_rank, dist_url: as in Detectron2's `launch`.
        device: "cuda" or "cpu".

    Raises:
        UserError: a process has no GPU of its own, or variables or an address are missing.
    """
    if "RANK" in os.environ:
        _join(main, device, args)
    elif num_machines * num_processes <= 1:
        main(*args)
    else:
        _spawn(main, num_processes, num_machines, machine_rank, dist_url, device, args)


def _join(main: Callable, device: str, args: tuple) -> None:
    """Make a job of processes that a launcher has started."""
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set, as by a launcher of processes, but not {', '.join(missing)}: start with "
            "torchrun, or unset RANK to have --num-gpus start the processes."
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    # SLURM's --gpus-per-task=1 and the like show each process its own GPU only
    if not (device.startswith("cuda") and torch.cuda.device_count() == 1):
        _check_devices(device, local_size)
    store = _store_of_attempt()
    if device.startswith("cuda"):
        _check_that_no_device_is_shared(store)
    local_rank = int(os.environ["LOCAL_RANK"])
    _run(main, args, device, rank, world_size, local_rank, local_size, store=store)


def _store_of_attempt() -> dist.Store:
    """
    torchrun's store. It keeps the addresses of processes that have failed, and those that are
    started in their place (--max-restarts) must not connect to them.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=DEFAULT_TIMEOUT))
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _spawn(
    main: Callable,
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    args: tuple,
) -> None:
    """Start the processes of this machine, and wait for them."""
    _check_devices(device, num_processes)
    if dist_url == "auto":
        if num_machines > 1:
            raise UserError("--dist-url auto works on one machine; give tcp://HOST:PORT for more.")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{s.getsockname()[1]}"  # a free port
    worker_args = (main, num_processes, num_machines, machine_rank, dist_url, device, args)
    processes = mp.spawn(_spawned, nprocs=num_processes, args=worker_args, join=False)
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for process in processes.processes:
            if process.is_alive():
                # Not SIGINT: Ctrl-C has sent it to them, and a second one ends them at once
                process.terminate()

    try:
        # At a signal the processes save their work and leave, then this one does
        with stop_signals_handled(forward):
            while not processes.join():  # one that fails ends the others
                pass
    except mp.ProcessExitedException as error:
        if error.signal_name and not received:
            raise UserError(
                f"A process was ended by {error.signal_name}; if nobody ended it, memory ran out."
            ) from error
        # The process has said why, unless the signal forwarded to it has ended it
        stopped = received and error.exit_code in (-signal.SIGTERM, 128 + signal.SIGTERM)
        sys.exit(128 + received[0] if stopped else error.exit_code)


def _spawned(
    local_rank: int,
    main: Callable,
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    args: tuple,
) -> None:
    rank, world_size = machine_rank * num_processes + local_rank, num_machines * num_processes
    _run(main, args, device, rank, world_size, local_rank, num_processes, init_method=dist_url)


def _check_devices(device: str, local_size: int) -> None:
    if device.startswith("cuda") and local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes were asked for on a machine that shows "
            f"{torch.cuda.device_count()} GPU(s); each process needs one of its own."
        )


def _check_that_no_device_is_shared(store: dist.Store) -> None:
    """NCCL would wait, or fail with an error that says less. All processes raise together."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"device_of_{rank}", f"{_device_name()} on {socket.gethostname()}")
    if rank == 0:
        ranks: dict[str, list[int]] = {}
        for k in range(world_size):
            ranks.setdefault(store.get(f"device_of_{k}").decode(), []).append(k)
        shared = next((f"{k}: {v}" for k, v in ranks.items() if len(v) > 1), "")
        store.set("shared_device", shared)
    shared = store.get("shared_device").decode()
    if shared:
        raise UserError(
            f"Each process needs a GPU of its own, but several would share one ({shared}): start "
            "as many processes as there are GPUs, or show each process another GPU."
        )


def _device_name() -> str:
    """A name that no other GPU of the machine has, whichever of them this process sees."""
    index = _device_index(int(os.environ["LOCAL_RANK"]))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "MIG-" in visible:  # parts of one GPU
        return f"GPU {visible.split(',')[index]}"
    # PyTorch has it from 2.4 on
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return f"GPU {uuid or (visible.split(',')[index] if visible else index)}"


def _device_index(local_rank: int) -> int:
    """Of the process's GPU among those it sees: the only one, or the one with its number."""
    return 0 if torch.cuda.device_count() == 1 else local_rank


def _run(
    main: Callable,
    args: tuple,
    device: str,
    rank: int,
    world_size: int,
    local_rank: int,
    local_size: int,
    **rendezvous: Any,
) -> None:
    """Run `main` in this process of a job; `rendezvous` is for `init_process_group`."""
    use_cuda = device.startswith("cuda")
    if use_cuda:
        torch.cuda.set_device(_device_index(local_rank))
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=DEFAULT_TIMEOUT,
        **rendezvous,
    )
    _create_local_process_group(local_size)
    comm.synchronize()
    try:
        main(*args)
    except SystemExit:
        if not use_cuda:  # NCCL's would wait for processes that may be gone
            _end_process_groups()
        raise
    _end_process_groups()


def _end_process_groups() -> None:
    """Also those that Detectron2 keeps: left to the end of the program, they sometimes abort it."""
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
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
