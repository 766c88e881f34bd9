"""Trainings in processes of their own that are killed, stopped, or run out of disk."""

import json
import os
import resource
import signal
import time
import types
from pathlib import Path
from typing import Any

import torch

from detectron2.engine import SimpleTrainer

from msrcnn_d2.checkpoint import MaskScoringCheckpointer, checkpointer
from msrcnn_d2.engine import loop
from msrcnn_d2_runtime import files as whole_file
from tests.helpers import forked


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
        self.process = forked.start(_run, args, str(self.losses_file), prepare, log=self.output)

    def losses(self) -> list:
        """(iteration, {name: loss}) in the order in which they came."""
        lines = self.losses_file.read_text().splitlines(keepends=True)
        return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, condition, timeout=600) -> None:
        """Until `condition(self)` holds, or the process has ended."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and not condition(self):
            assert time.monotonic() < end, self.printed()[-3000:]
            time.sleep(0.002)

    def exit_code(self, timeout=600) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.printed()[-3000:]
        return self.process.exitcode


def _run(args, losses_file, prepare):
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
    forked.train(*args)


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


def run_out_of_disk(count: int, size: int) -> None:
    """
    From the given checkpoint or tag on, no file can become larger than `size` bytes: the system
    fails to write it, as on a disk that is full.
    """
    left = [count]

    def open_and_count(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return open(*args, **kwargs)

    whole_file.open = open_and_count


def evaluate_slowly(seconds: float) -> None:
    """Take that long for each image."""
    from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator

    process = MaskScoringCOCOEvaluator.process

    def slow(self, *args):
        time.sleep(seconds)
        process(self, *args)

    MaskScoringCOCOEvaluator.process = slow


def ap_of(weights: dict[str, Any]) -> float:
    """A number below 10 that differs with any weight of the MaskIoU head."""
    head = (x.double() for name, x in weights.items() if "mask_iou_head" in name)
    return 2e5 * sum(x.sum().item() for x in head) % 10


def evaluate_weights(moment: str = "", count: int = 1) -> None:
    """
    The AP of masks depends on the weights. It is best after iteration 3.

    Args:
        moment: when to kill the process: in an "evaluation", while the best checkpoint is
            "written", or after that ("saved"); "" for never. A "signal" asks it to stop in an
            evaluation.
        count: the how-manieth time it comes.
    """
    left = [count]

    def die_at(this_moment, number=signal.SIGKILL):
        if moment == this_moment:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), number)

    trainers = []

    class EvalHook(loop.EvalHook):
        def _do_eval(self):
            trainers.append(self.trainer)
            super()._do_eval()

    def evaluate(recipe, model, *args):
        die_at("evaluation")
        die_at("signal", signal.SIGTERM)
        return {"segm": {"AP": 20 * (trainers[-1].iter == 3) + ap_of(model.state_dict())}}

    save = MaskScoringCheckpointer.save

    def save_or_die(self, name, **kwargs):
        if name == "model_best" and moment == "written":
            left[0] -= 1
            if not left[0]:
                die_while_saving("half", 1)
        save(self, name, **kwargs)
        if name == "model_best":
            die_at("saved")

    loop.EvalHook, loop.evaluate = EvalHook, evaluate
    MaskScoringCheckpointer.save = save_or_die
