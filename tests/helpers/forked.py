"""
Processes that start in no time. They are forked from a server that has imported PyTorch, Detectron2
and this package, which takes a process of its own several seconds of CPU time.
"""

import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

# What the processes need, for the server
import msrcnn_d2.engine
import msrcnn_d2.report  # noqa: F401
from msrcnn_d2_cli import main
from tests.helpers import toy_training  # noqa: F401

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([__name__])

# PyTorch's first set_num_threads() after a fork makes its thread pool anew, without a lock. Two
# threads of a backward pass that come first together end the process: "Invalid thread pool!"
os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def start(
    function: Callable, *args: object, log: Path, environment: Mapping[str, str] | None = None
) -> multiprocessing.process.BaseProcess:
    """
    Call a function in a process of its own, and of a session of its own.

    Args:
        function: of a module, with arguments that can be pickled.
        log: file for what the process and those that it starts print.
        environment: variables that are set for it.
    """
    process = _server.Process(target=_run, args=(function, args, str(log), dict(environment or {})))
    with pytest.MonkeyPatch.context() as patch:
        # For the server, which is started with the first process: older Pythons do not tell it
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    return process


def _run(function, args, log, environment):
    os.setsid()
    with open(log, "w", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(environment)
    # launch_processes() spawns its processes, which import everything again; forked ones need not
    torch.multiprocessing.spawn = functools.partial(
        torch.multiprocessing.start_processes, start_method="fork"
    )
    function(*args)


def train(*args: object) -> None:
    """Run `msrcnn-d2 train`."""
    sys.exit(main(["train", *map(str, args)]))


def calibrate(*args: object) -> None:
    """Run `msrcnn-d2 calibrate`."""
    sys.exit(main(["calibrate", *map(str, args)]))


def as_torchrun(function: Callable, *args: object) -> None:
    """
    Call a function in two processes with the variables that torchrun sets. The exit code is 1 if
    one of them fails, as torchrun's is.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    fork = multiprocessing.get_context("fork")
    processes = []
    for k in "01":
        variables = {**address, **sizes, "RANK": k, "LOCAL_RANK": k}
        processes.append(fork.Process(target=_as_rank, args=(variables, function, args)))
        processes[-1].start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


def _as_rank(variables, function, args):
    os.environ.update(variables)
    function(*args)
