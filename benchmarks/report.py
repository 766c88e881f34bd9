"""What a benchmark gives back, how it is printed, and the machine it ran on."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import detectron2

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pycocotools",
    "faster-coco-eval",
    "opencv-python-headless",
    "onnxruntime",
    "openvino",
)


@dataclass
class Target:
    """
    Attributes:
        what: the measured number, in words.
        limit: what it is to be at most, or at least if `at_least`.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        verdict = "met" if self.met else "NOT met"
        return f"{self.what}: {self.value:.3g}, to be {sign} {self.limit:g}: {verdict}"


@dataclass
class Part:
    """
    One part of the benchmark.

    Attributes:
        title: a line that says what was measured.
        headers, rows: a table; numbers have the unit that their header names.
        targets: what some of the numbers were to be.
        notes: sentences below the table.
        data: the measured numbers, with spread, as JSON takes them.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        table = tabulate(self.rows, self.headers, "github", floatfmt=".4g")
        return "\n\n".join([f"### {self.title}", table, *self.notes, *map(str, self.targets)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "targets": [{**asdict(t), "met": t.met} for t in self.targets]}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "detectron2": detectron2.__version__,
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
