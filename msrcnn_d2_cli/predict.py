"""
Find objects in images and videos with a trained model, and write what is found: pictures to look
at, and masks and scores in the formats of other tools.

An INPUT is an image or a video; a folder, with its subfolders; a pattern such as 'photos/**/*.jpg';
the address of an image, with http:// or https://; or - for a list of these on standard input.
Results are in a folder that mirrors the folders of the inputs. A run that was interrupted, or
killed, continues with --resume.

Only objects with a score of at least 0.3 are kept, unless a threshold is given. The score is the
one that they are sorted by, usually the mask score: class score x predicted IoU of the mask. To
compute AP from the results, keep all with --score-threshold 0.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msrcnn_d2_runtime.errors import UserError

from .parsing import (
    UsageError,
    add_predictor_arguments,
    at_least,
    names_in_list,
    number_from,
    predictor_from,
)

if TYPE_CHECKING:
    from msrcnn_d2_runtime.filtering import Filter
    from msrcnn_d2_runtime.predictions import PredictedImage, Predictions
    from msrcnn_d2_runtime.predictor import Predictor
    from msrcnn_d2_runtime.sources import Source
    from msrcnn_d2_runtime.video import VideoSource

USAGE = "INPUT... --model MODEL [options]"
EXAMPLES = """
  pictures and a table of what is in the images of a folder, by a model of yours:
    {prog} photos/ --model output/model_final.pth --output results
  with published weights, which are downloaded once:
    {prog} photo.jpg --model ms_rcnn_R_50_FPN_1x
  only good masks of people, as COCO results and a PNG for each mask:
    {prog} 'photos/**/*.jpg' --model output/model_final.pth --classes person \\
      --min-mask-score 0.6 --save coco,masks
  every second frame of a video, whose objects have numbers:
    {prog} clip.mp4 --model output/model_final.pth --stride 2 --track
  an exported model, without PyTorch:
    {prog} photos/ --model model.onnx
  a line of JSON for each image, for other programs:
    find photos -name '*.jpg' | {prog} - --model model.onnx --output - | jq .image
  continue after an interruption:
    {prog} photos/ --model output/model_final.pth --output results --resume
"""

# Those of msrcnn_d2_runtime.outputs, which needs NumPy
KINDS = ("pictures", "coco", "dataset", "csv", "label-maps", "masks", "jsonl")
LABELS = ("short", "full", "none")
SEGMENTATIONS = ("polygons", "rle")
DEFAULT_THRESHOLD = 0.3
STANDARD_OUTPUT = "-"
LOG_PERIOD = 30.0  # seconds between two lines where no bar can be shown


def kinds_in_list(text: str) -> list[str]:
    kinds = names_in_list(text)
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"takes {', '.join(KINDS)}, not '{kind}'")
    return kinds


def threshold(text: str) -> float | str:
    """A number, or a precision such as p95@75."""
    return text if text.startswith("p") else number_from(0, 1)(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="images, see above")
    add_predictor_arguments(parser)

    kept = parser.add_argument_group("what is kept, in all outputs alike")
    kept.add_argument(
        "--score-threshold",
        type=threshold,
        metavar="X",
        help="smallest score, of the one that predictions are sorted by (default: 0.3, or none "
        "with one of the next three); for a calibrated model also a precision, such as p95@75: 95 "
        "percent of the masks have an IoU of 0.75",
    )
    score = number_from(0, 1)
    for name, title in (
        ("mask-score", "mask score"),
        ("score", "class score"),
        ("iou", "predicted IoU"),
    ):
        kept.add_argument(f"--min-{name}", type=score, metavar="X", help=f"smallest {title}")
    kept.add_argument(
        "--classes",
        type=names_in_list,
        metavar="NAME,...",
        help="only objects of these classes; a name with a comma is in double quotes",
    )
    kept.add_argument(
        "--top-k", type=at_least(1), metavar="K", help="at most K objects of an image, the best"
    )

    results = parser.add_argument_group("results")
    results.add_argument(
        "--output",
        default="predictions",
        metavar="DIR",
        help="new folder to write (default: predictions); - for lines of JSON on standard output",
    )
    results.add_argument(
        "--save",
        type=kinds_in_list,
        metavar="KIND,...",
        help=f"any of {', '.join(KINDS)} (default: pictures,csv). predictions.jsonl is always "
        "written, and has everything",
    )
    results.add_argument(
        "--labels",
        choices=LABELS,
        default="short",
        help="of pictures: class and score, all scores, or none (default: short)",
    )
    results.add_argument(
        "--legend", action="store_true", help="number the objects, with the scores beside them"
    )
    results.add_argument(
        "--segmentation",
        choices=SEGMENTATIONS,
        default="polygons",
        help="masks of the COCO dataset: polygons, or RLE, which fewer tools read "
        "(default: polygons)",
    )
    results.add_argument(
        "--annotations",
        metavar="FILE",
        help="annotations of the images in COCO's format, whose ids the results then have",
    )
    results.add_argument(
        "--resume", action="store_true", help="continue the run in the output folder, if any"
    )

    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch-size",
        type=at_least(1),
        default=1,
        metavar="N",
        help="images, or tiles, that the model sees at once (default: 1)",
    )
    work.add_argument(
        "--stride",
        type=at_least(1),
        default=1,
        metavar="N",
        help="predict every N-th frame of a video (default: 1)",
    )
    work.add_argument(
        "--track",
        action="store_true",
        help="give the objects of a video numbers, which they keep from frame to frame",
    )


def check_arguments(args: argparse.Namespace) -> None:
    if not args.inputs:
        raise UsageError("Give images to predict: files, folders, patterns, or - for a list.")
    if not (args.model or args.config_file or args.weights):
        raise UsageError(
            "Give a model with --model: a checkpoint, an exported file, or a name such as "
            "ms_rcnn_R_50_FPN_1x."
        )
    if args.output == STANDARD_OUTPUT:
        for name in ("save", "resume", "legend", "annotations"):
            if getattr(args, name):
                raise UsageError(f"--{name} needs a folder: --output - writes lines of JSON only.")


def run(args: argparse.Namespace) -> int:
    from msrcnn_d2_runtime.inputs import find_inputs
    from msrcnn_d2_runtime.outputs import JsonLines, OutputFolder
    from msrcnn_d2_runtime.text import plural
    from msrcnn_d2_runtime.video import VideoSource

    to_stream = args.output == STANDARD_OUTPUT
    found = find_inputs(
        args.inputs,
        standard_input=sys.stdin.buffer if "-" in args.inputs else None,
        without=None if to_stream else args.output,
        stride=args.stride,
    )
    videos = [source for source in found.sources if isinstance(source, VideoSource)]
    if found.num_ignored:
        tell(f"{plural(found.num_ignored, 'other file')} in the inputs left out.")
    log_to_stderr()
    wanted, score_threshold = filter_from(args)
    predictor = predictor_from(args, score_threshold, tile_batch_size=args.batch_size)
    wanted.class_indices(predictor.class_names)  # before the folder is made
    if to_stream:
        stream = JsonLines(sys.stdout.buffer, predictor.class_names)
        write = tracking(args, videos, stream.write)
        with writing("standard output"):
            return predict(args, predictor, found.sources, wanted, write, set())
    settings = settings_of(args, predictor, wanted, score_threshold)
    with writing(f"'{args.output}'", ": when that is mended, continue with --resume"):
        output = OutputFolder(
            args.output,
            args.save or ["pictures", "csv"],
            class_names=predictor.class_names,
            settings=settings,
            resume=args.resume,
            labels=args.labels,
            legend=args.legend,
            segmentation=args.segmentation,
            annotations=args.annotations,
            videos=videos,
        )
        with contextlib.closing(output):
            earlier = ((name, output.predictions(name)) for name in sorted(output.done))
            write = tracking(args, videos, output.write, earlier)
            code = predict(args, predictor, found.sources, wanted, write, output.done)
            output.finish()  # after an interruption, too: what there is can be used
    print(f"results: {os.path.join(args.output, '')}")
    return code


@contextlib.contextmanager
def writing(place: str, advice: str = "") -> Iterator[None]:
    """
    Raises:
        UserError: a full disk, say. Images that cannot be read are skipped, and raise no error.
    """
    try:
        yield
    except BrokenPipeError:  # such as `| head`
        raise
    except OSError as error:
        raise UserError(f"Cannot write to {place} ({error.strerror or error}){advice}.") from error


def tracking(
    args: argparse.Namespace,
    videos: "Sequence[VideoSource]",
    write: "Callable[[PredictedImage], None]",
    earlier: "Iterable[tuple[str, Predictions]]" = (),
) -> "Callable[[PredictedImage], None]":
    """Give objects numbers before they are written, if that is asked for."""
    if not args.track:
        return write
    from msrcnn_d2_runtime.tracking import VideoTracker

    track = VideoTracker(videos, earlier)
    return lambda image: write(track(image))


def filter_from(args: argparse.Namespace) -> "tuple[Filter, float | str]":
    """What is kept, and the threshold of the predictor itself."""
    from msrcnn_d2_runtime.filtering import Filter

    minima = {f"min_{x}": getattr(args, f"min_{x}") for x in ("score", "mask_score", "iou")}
    given = {name: value for name, value in minima.items() if value is not None}
    score_threshold = args.score_threshold
    if score_threshold is None:
        score_threshold = 0.0 if given else DEFAULT_THRESHOLD
    return Filter(**given, classes=args.classes, top_k=args.top_k), score_threshold


def predict(
    args: argparse.Namespace,
    predictor: "Predictor",
    sources: "Sequence[Source]",
    wanted: "Filter",
    write: "Callable[[PredictedImage], None]",
    done: set[str],
) -> int:
    """
    Predict and write all images that are not done.

    Returns:
        the exit code: 1 if an image was skipped, 130 after Ctrl-C.
    """
    from msrcnn_d2_runtime.pipeline import predict_all, write_behind
    from msrcnn_d2_runtime.text import plural

    skipped: list[str] = []
    done = set(done)  # the writer adds to the other one
    frames_done = Counter(name.rpartition("/")[0] for name in done)
    num_done = sum(source.name in done or frames_done[source.name] for source in sources)
    if num_done:
        tell(f"{plural(num_done, 'image')} done before.")
    if num_others := len(done) - num_done:  # with other inputs, an image may have another name
        tell(f"The results also have {plural(num_others, 'image')} that these inputs lack.")
    num_left = sum(source.num_images for source in sources) - num_done
    progress = Progress(num_left)

    def skip(location: str, error: Exception) -> None:
        skipped.append(location)
        message = reason(error)
        named = f"'{location}'" in message
        progress.tell(f"skipped: {message}" if named else f"skipped '{location}': {message}")
        progress.add()

    counts: Counter[str] = Counter()
    start, num_images, num_empty, interrupted = time.monotonic(), 0, 0, False
    try:
        with contextlib.ExitStack() as stack:
            predicted = predict_all(
                predictor,
                sources,
                batch_size=1 if args.tile else args.batch_size,
                filter=wanted,
                skip=done,
                on_error=skip,
            )
            stack.callback(predicted.close)
            written = write_behind(predicted, write)
            stack.callback(written.close)
            for image in written:
                num_images += 1
                classes = image.predictions.pred_classes.tolist()
                num_empty += not classes
                counts.update(predictor.class_names[k] for k in classes)
                progress.add()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.close()
    seconds = max(time.monotonic() - start, 1e-6)

    objects = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    parts = [
        f"{plural(num_images, 'image')} in {seconds:.1f} s ({num_images / seconds:.2f} images/s)",
        f"{plural(counts.total(), 'object')}{f' ({objects})' if objects else ''}",
        *([f"{num_empty:,} without objects"] if num_empty else []),
        *([f"{len(skipped):,} skipped"] if skipped else []),
    ]
    print("; ".join(parts), file=sys.stderr if args.output == STANDARD_OUTPUT else sys.stdout)
    if interrupted:
        left = max(0, num_left - num_images - len(skipped))
        advice = "" if args.output == STANDARD_OUTPUT else ": add --resume to continue"
        tell(f"Interrupted, {plural(left, 'image')} left{advice}.")
        return 128 + signal.SIGINT
    return 1 if skipped else 0


def reason(error: Exception) -> str:
    """What is wrong with an image, and which option helps."""
    advice = {
        "image-deep": "say which values become 0 and 255 by --intensity-range, such as 0 4095, or "
        "by --intensity-percentiles, such as 0.1 99.9",
        "image-pixels": "give a larger number as --max-pixels if its source is trusted",
    }
    kind = getattr(error.__cause__, "kind", "")
    if kind in advice:
        what, _, _ = str(error.__cause__).partition(": ")  # what follows is about configs
        return f"{what}: {advice[kind]}"
    return " ".join(str(error).split()) or type(error).__name__


def settings_of(
    args: argparse.Namespace,
    predictor: "Predictor",
    wanted: "Filter",
    score_threshold: float | str,
) -> dict[str, Any]:
    """What decides about the predictions, which has to be the same when a run is resumed."""
    model: dict[str, Any]
    if (args.model or "").endswith(".onnx"):
        model = {"model": fingerprint(args.model)}
    else:
        from msrcnn_d2.prediction.loading import find_model

        found = find_model(args.model, config_file=args.config_file, weights=args.weights)
        model = {"config": fingerprint(found.config_file), "overrides": args.opts}
        if found.weights is not None:
            model["weights"] = fingerprint(found.weights)
    images = dataclasses.asdict(predictor.image_settings)
    del images["max_pixels"]  # which images are read, but not how
    return {
        **model,
        "rank_by": predictor.rank_by,
        "score_threshold": score_threshold,
        **dataclasses.asdict(wanted),
        "images": images,
        "amp": args.amp,
        "tta": args.tta,
        "stride": args.stride,
        "track": args.track,
        "tiles": {"size": args.tile, "overlap": args.overlap} if args.tile else None,
    }


def fingerprint(file: str) -> str:
    """The name of a file with its checksum; or what is not a file, such as a name of the zoo."""
    if not os.path.isfile(file):
        return file
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return f"{os.path.basename(file)} {digest.hexdigest()}"


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Show warnings of the libraries, above the progress bar."""
    import logging

    from tqdm import tqdm

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[Handler()]
    )


class Progress:
    """A bar with the time left and images/s; where there is no terminal, a line now and then."""

    def __init__(self, total: int):
        from tqdm import tqdm

        self._is_shown = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, unit="image", file=sys.stderr, disable=not self._is_shown, smoothing=0.1
        )
        self._start = self._last = time.monotonic()
        self._total, self._count = total, 0

    def add(self) -> None:
        self._count += 1
        self._bar.update()
        now = time.monotonic()
        if not self._is_shown and now - self._last >= LOG_PERIOD:
            self._last = now
            rate = self._count / (now - self._start)
            # Videos may have more frames than they announce
            left = self._bar.format_interval(max(0, self._total - self._count) / rate)
            tell(f"{self._count:,} of {self._total:,} images, {rate:.2f} images/s, {left} left")

    def tell(self, message: str) -> None:
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
