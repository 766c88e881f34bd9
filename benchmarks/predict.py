"""Images per second of `msrcnn-d2 predict`, against its model alone, and what its outputs cost."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.measuring import time_in_turn
from benchmarks.models import DEVICE
from benchmarks.report import Part, Target
from benchmarks.throughput import Work, r50_on_photos, shapes
from msrcnn_d2 import load_predictor
from msrcnn_d2_runtime.filtering import Filter
from msrcnn_d2_runtime.image_reading import read_bgr_image
from msrcnn_d2_runtime.outputs import KINDS, OutputFolder
from msrcnn_d2_runtime.pipeline import predict_all, write_behind
from msrcnn_d2_runtime.predictions import PredictedImage

NUM_IMAGES = 80
NUM_SLOW_IMAGES = 3  # of R-50-FPN on a CPU, which takes seconds for each
SCORE_THRESHOLD = 0.3  # of `msrcnn-d2 predict`, for a model that is trained
USUAL = ["pictures", "coco"]
TARGET = 0.9  # of the images per second of the model alone


def run(options) -> list[Part]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if DEVICE == "cuda":
            work, threshold = r50_on_photos(folder, NUM_IMAGES), 0.0
        else:
            work, threshold = shapes(folder, NUM_IMAGES), SCORE_THRESHOLD
        bench = Bench(work, threshold, folder)
        parts = [
            bench.throughput([None, ["jsonl"], ["coco"], USUAL], options.rounds),
            bench.outputs(options.rounds),
        ]
        if DEVICE == "cpu":
            bench = Bench(r50_on_photos(folder, NUM_SLOW_IMAGES), 0.0, folder)
            parts += [bench.throughput([USUAL], options.rounds, warm_up=False)]
            parts += [bench.outputs(options.rounds)]
    return parts


class Bench:
    """
    A predictor with its images.

    Attributes:
        files, images: the same images, on the disk and in memory.
        folder: for outputs.
    """

    def __init__(self, work: Work, score_threshold: float, folder: Path):
        self.title, self.folder = work.title, folder
        self.predictor = load_predictor(
            config_file=work.config,
            weights=work.weights,
            opts=work.opts,
            score_threshold=score_threshold,
        )
        self.files = sorted(map(str, work.images.iterdir()))
        self.images = [read_bgr_image(x, self.predictor.image_settings) for x in self.files]
        self.filter = Filter()

    def throughput(
        self, cases: Sequence[list[str] | None], rounds: int, warm_up: bool = True
    ) -> Part:
        """
        Args:
            cases: kinds of outputs; None for no outputs.
        """
        alone = "the model alone"
        functions: dict[str, Callable[[], object]] = {alone: self.model_alone}
        for kinds in cases:
            if kinds is None:
                functions["read, predict"] = self.read_and_predict
            else:
                name = f"read, predict, write {' and '.join(kinds)}"
                functions[name] = partial(self.read_predict_write, kinds)
        timings = time_in_turn(functions, rounds, warm_up)
        rows = [
            [name, len(self.images) / t.median, 1 / t.ratio_to(timings[alone])]
            for name, t in timings.items()
        ]
        return Part(
            f"`msrcnn-d2 predict`: {self.title}, on {DEVICE}",
            ["", "images / s", "ratio"],
            rows,
            targets=[Target("images / s, relative to the model alone", rows[-1][2], TARGET, True)],
            data={name: t.as_dict() for name, t in timings.items()},
        )

    def model_alone(self) -> None:
        for image in self.images:
            (predictions,) = self.predictor.predictions([image])
            self.filter(predictions, self.predictor.class_names)

    def read_and_predict(self) -> list[PredictedImage]:
        return [*predict_all(self.predictor, self.files, filter=self.filter)]

    def read_predict_write(self, kinds: Sequence[str]) -> None:
        with self._output(kinds) as output:
            images = predict_all(self.predictor, self.files, filter=self.filter)
            for _ in write_behind(images, output.write):
                pass

    def outputs(self, rounds: int) -> Part:
        """CPU time of writing, while nothing else works."""
        images = self.read_and_predict()
        num_objects = sum(len(x.predictions) for x in images) / len(images)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                with self._output([kind]) as output:
                    start = time.process_time()
                    for image in images:
                        output.write(image)
                    output.finish()
                    seconds[kind].append((time.process_time() - start) / len(images))
        found = {kind: 1e3 * median(values) for kind, values in seconds.items()}
        # Each of them writes the lines of JSON as well
        beyond = {kind: ms - found["jsonl"] for kind, ms in found.items() if kind != "jsonl"}
        return Part(
            f"CPU time of outputs per image: {self.title}, {num_objects:.1f} objects",
            ["", "ms"],
            [*({"jsonl": found["jsonl"]} | beyond).items()],
            data=found,
        )

    def _output(self, kinds: Sequence[str]) -> OutputFolder:
        folder = tempfile.mkdtemp(dir=self.folder)
        names = self.predictor.class_names
        return OutputFolder(folder, kinds, class_names=names, settings={})
