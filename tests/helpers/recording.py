"""A hook and a writer of a user's, which tell in files what they are called with."""

import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage


def recorded(path) -> list:
    """What hooks and writers have told so far."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tell(path, *told) -> None:
    with open(path, "a") as f:
        f.write(json.dumps(told) + "\n")


class RecordingHook(HookBase):
    """Tells (rank, iteration, whether there are results of this iteration's evaluation)."""

    def __init__(self, path: str = "hook.txt"):
        self.path = path

    def after_step(self):
        self._tell(self.trainer.iter)
        self.trainer.storage.put_scalar(
            "recorded/ten_times", 10 * self.trainer.iter, smoothing_hint=False
        )

    def after_train(self):
        self._tell("end")

    def _tell(self, when):
        results = self.trainer.storage.latest().get("segm/AP", (0, -1))
        tell(self.path, comm.get_rank(), when, results[1] == self.trainer.iter)


class RecordingWriter(EventWriter):
    """Tells (rank, iteration, a metric of the hook above), and "closed"."""

    def __init__(self, path: str = "writer.txt", fails_at: Sequence[int | str] = ()):
        self.path = path
        self.fails_at = fails_at

    def write(self):
        storage = get_event_storage()
        metric = storage.latest().get("recorded/ten_times", (None, -1))[0]
        tell(self.path, comm.get_rank(), storage.iter, metric)
        if storage.iter in self.fails_at:
            raise ConnectionError("the server is down.\nMore of it")

    def close(self):
        tell(self.path, "closed")
        if "close" in self.fails_at:
            raise ConnectionError("the server is still down")


def no_hook():
    return "no hook"


class FailingHook(HookBase):
    def __init__(self, number: int):
        raise ValueError(f"{number} is\nno good number")
