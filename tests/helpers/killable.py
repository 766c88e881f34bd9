"""Trainings in processes of their own that can be killed, and start fast: imports are done once."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from detectron2.engine import SimpleTrainer

from msrcnn_d2.checkpoint import checkpointer
from msrcnn_d2.utils import files as whole_file
from msrcnn_d2_cli import main

# Its server imports this module, and each training is forked from there
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


class Training:
    """
    A process that runs `msrcnn-d2 train`.

    Attributes:
        process: of `multiprocessing`.
        output: file with what it prints.
    """

    def __init__(self, args, folder, prepare=None):
        """
        Args:
            args: of `msrcnn-d2 train`.
            folder: for the files of the losses and of the output.
            prepare: name of a function of this module, and its arguments, to call before training.
        """
        number = len(list(Path(folder).glob("losses_*")))
        self.losses_file = Path(folder) / f"losses_{number}"
        self.losses_file.touch()
        self.output = Path(folder) / f"output_{number}"
        self.process = context.Process(
            target=_run,
            args=([str(a) for a in args], str(self.losses_file), str(self.output), prepare),
        )
        with pytest.MonkeyPatch.context() as patch:
            # For the server, which is started with the first process: older Pythons do not tell it
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            self.process.start()

    def losses(self) -> list:
        """(iteration, {name: loss}) in the order in which they came."""
        lines = self.losses_file.read_text().splitlines(keepends=True)
        return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, condition, timeout=120) -> None:
        """Until `condition(self)` holds, or the process has ended."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and not condition(self):
            assert time.monotonic() < end, self.printed()[-3000:]
            time.sleep(0.002)

    def exit_code(self, timeout=120) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.printed()[-3000:]
        return self.process.exitcode


def _run(args, losses_file, output, prepare):
    torch.set_num_threads(1)
    with open(output, "w", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    write_metrics = SimpleTrainer._write_metrics

    def record(self, loss_dict, *rest, **kwargs):
        losses = {k: v.item() for k, v in loss_dict.items()}
        with open(losses_file, "a") as f:
            f.write(json.dumps([self.iter, losses]) + "\n")
        write_metrics(self, loss_dict, *rest, **kwargs)

    SimpleTrainer._write_metrics = record
    if prepare:
        name, *arguments = prepare
        globals()[name](*arguments)
    main(["train", *args])
    sys.stdout.flush()


# What happens to a training


def die_while_saving(moment: str, count: int) -> None:
    """
    Kill the process at the given time that this moment comes: "half" way in writing a checkpoint;
    before it is on the disk ("synced"); before and after it gets its name ("named", "renamed").
    """
    left = [count]

    def comes():
        left[0] -= 1
        return not left[0]

    def die():
        if comes():
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function, before):
        def call(*args, **kwargs):
            if before:
                die()
            result = function(*args, **kwargs)
            if not before:
                die()
            return result

        return call

    def save_half(contents, f):
        torch.save(contents, f)
        if comes():
            f.flush()
            f.truncate(f.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "half":
        checkpointer.torch = types.SimpleNamespace(**{**vars(torch), "save": save_half})
    else:
        name = "fsync" if moment == "synced" else "replace"
        parts = {**vars(os), name: dying(getattr(os, name), before=moment != "renamed")}
        whole_file.os = types.SimpleNamespace(**parts)


def evaluate_slowly(seconds: float) -> None:
    """Take that long for each image."""
    from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator

    process = MaskScoringCOCOEvaluator.process

    def slow(self, *args):
        time.sleep(seconds)
        process(self, *args)

    MaskScoringCOCOEvaluator.process = slow
