"""How things are timed: in turn, several times, so that noise meets all of them alike."""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROUNDS = 5


@dataclass
class Timing:
    """
    Attributes:
        seconds: of each round, in the order of the rounds.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def ratio_to(self, other: "Timing") -> float:
        """Median over the rounds of this one's time as a share of the other's in the same round."""
        return median(a / b for a, b in zip(self.seconds, other.seconds))

    def as_dict(self) -> dict[str, float]:
        """Median and extremes in seconds, and the number of rounds; for JSON."""
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "rounds": len(self.seconds),
        }


class Stopwatch:
    """
    Times the steps of one run: `result = stopwatch("step", function, *args)`.

    Attributes:
        seconds: {step: seconds}; the times of steps of the same name are added up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, function: Callable, *args, **kwargs) -> Any:
        synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize()
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
        return result


def time_in_turn(
    functions: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS, warm_up: bool = True
) -> dict[str, Timing]:
    """
    Call each function once a round; the order is reversed from round to round, so that none of
    them always comes after the same other.

    Args:
        warm_up: whether a first round is not counted.

    Returns:
        a timing for each function.
    """
    return {
        name: timings["total"]
        for name, timings in _times(functions, rounds, warm_up, False).items()
    }


def time_steps_in_turn(
    functions: Mapping[str, Callable[[Stopwatch], Any]],
    rounds: int = ROUNDS,
    warm_up: bool = True,
) -> dict[str, dict[str, Timing]]:
    """
    :func:`time_in_turn` of functions whose steps are timed as well.

    Args:
        functions: each is called with the stopwatch for its steps.

    Returns:
        for each function {step: timing}, in the order of the steps; "total" is the sum of them.
    """
    return _times(functions, rounds, warm_up, True)


def _times(functions, rounds, warm_up, with_steps):
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in functions}
    for k in range(-1 if warm_up else 0, rounds):
        for name in list(functions)[:: 1 if k % 2 else -1]:
            stopwatch = Stopwatch()
            if with_steps:
                functions[name](stopwatch)
                stopwatch.seconds["total"] = sum(stopwatch.seconds.values())
            else:
                stopwatch("total", functions[name])
            if k >= 0:
                for step, value in stopwatch.seconds.items():
                    seconds[name].setdefault(step, []).append(value)
    return {name: {s: Timing(v) for s, v in steps.items()} for name, steps in seconds.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one, to have done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def one_thread() -> Iterator[None]:
    """
    PyTorch on one thread, for work that is done one small mask after the other. Sharing it brings
    next to nothing on an idle machine, and takes many times as long where others use the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(function: Callable[[], Any]) -> float:
    """
    Memory that a call needs at its peak, on top of what is there already, in MB of 2^20 bytes: of
    the GPU where there is one, else of the process, as Linux counts it (VmHWM), so that what NumPy
    and pycocotools allocate counts as well. Call the function once before, so that what it sets up
    then does not count.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = resident_kb("VmRSS")
    function()
    return (resident_kb("VmHWM") - before) / 2**10


def resident_kb(which: str) -> int:
    """Memory of this process in kB: "VmRSS" as it is now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith(which))
    return int(line.split()[1])
