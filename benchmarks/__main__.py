"""
Measure the time and memory that Mask Scoring R-CNN takes, beside what others take for the same.

Runs on a GPU if PyTorch finds one, else on the CPU. What is compared is timed in turn in this
process; numbers are medians. benchmarks/README.md says what each part is about.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import msrcnn_d2  # noqa: F401  imports Detectron2 without the warnings that others get

# isort: split

from benchmarks.measuring import ROUNDS
from benchmarks.report import Part, machine

PARTS = ("inference", "training", "targets", "evaluation", "throughput", "memory")
# Only when named: the others take a quarter of an hour on 2 cores already
ON_REQUEST = (
    "growth",
    "scaling",
    "data_check",
    "memory_simulated",
    "predict",
    "predict_memory",
    "deploy",
    "tiles",
)


def main() -> None:
    args = parse_args()
    found = machine()
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    parts: dict[str, list[Part]] = {}
    seconds: dict[str, float] = {}
    for name in args.parts or PARTS:
        start = time.perf_counter()
        parts[name] = importlib.import_module(f"benchmarks.{name}").run(args)
        seconds[name] = time.perf_counter() - start
        print("", *parts[name], f"({name} took {seconds[name]:.0f} s)", sep="\n\n", flush=True)
    report = {
        "machine": found,
        "rounds": args.rounds,
        "seconds": seconds,
        "parts": {name: [p.as_dict() for p in part] for name, part in parts.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nnumbers: {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(PARTS)} (all of these by default), {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is timed")
    parser.add_argument(
        "--full",
        action="store_true",
        help="evaluate 5,000 images in each round and not once: 8 minutes more on 2 cores",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/bench/bench.json"), help="file for the numbers"
    )
    args = parser.parse_args()
    parts = PARTS + ON_REQUEST
    unknown = [part for part in args.parts if part not in parts]
    if unknown:
        parser.error(f"there is no part '{unknown[0]}'; the parts are {', '.join(parts)}")
    if args.rounds < 1:
        parser.error("--rounds has to be at least 1")
    return args


if __name__ == "__main__":
    main()
