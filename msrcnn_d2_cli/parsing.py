"""Reading command lines: what the commands of `msrcnn-d2` have in common."""

import argparse
import csv
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from msrcnn_d2_runtime.image_reading import ImageSettings
    from msrcnn_d2_runtime.predictor import Predictor

__all__ = [
    "ENGINES",
    "Parser",
    "UsageError",
    "add_image_arguments",
    "add_precision_arguments",
    "add_predictor_arguments",
    "at_least",
    "image_arguments",
    "names_in_list",
    "number_from",
    "predictor_from",
    "settings_from",
]

# Those of msrcnn_d2.evaluation, which takes too long to import for --help
ENGINES = ("faster-coco-eval", "pycocotools")
# Of msrcnn_d2_runtime.ranking, which needs NumPy
RANK_BY = ("quality_score", "mask_score", "score")


class UsageError(Exception):
    """Arguments that do not go together; its message is one sentence."""


class Parser(argparse.ArgumentParser):
    """
    A parser that accepts options anywhere among the other arguments and reports a mistake in one
    sentence. It accepts no abbreviated options: they could mean something else in a later version.
    """

    def __init__(self, **kwargs: object):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs, allow_abbrev=False)  # type: ignore[arg-type]
        # Also -1e-3, which argparse takes for an option before Python 3.14
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf$|nan$)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments; "--", which may separate options from others, is left out."""
        argv = [x for x in argv if x != "--"]
        if {"-h", "--help"} & set(argv):
            self.print_help()
            sys.exit(0)
        args, rest = self.parse_known_intermixed_args(argv)
        if not rest:
            return args
        wrong = next((x for x in rest if x.startswith("-")), rest[0])
        kind = "option" if wrong.startswith("-") else "argument"
        name = wrong.split("=")[0] if kind == "option" else wrong
        nearest = difflib.get_close_matches(name, self._option_string_actions, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"see {self.prog} --help."
        if os.path.lexists(wrong):
            advice = f"write ./{wrong} if you mean the file."
        self.fail(f"Unknown {kind} '{name}'; {advice}")

    def fail(self, message: str) -> NoReturn:
        """Exit with 2, the code for a mistake of the user."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def error(self, message: str) -> NoReturn:
        """What argparse calls."""
        self.fail(f"{message}; see {self.prog} --help.")


def at_least(minimum: int) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number and not below `minimum`."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise argparse.ArgumentTypeError(
                f"needs a whole number of at least {minimum}, not '{text}'"
            )
        return number

    return whole_number


def number_from(low: float, high: float) -> Callable[[str], float]:
    """The `type` of an argument that is a number from `low` to `high`."""

    def number(text: str) -> float:
        value = _number(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"needs a number from {low:g} to {high:g}, not '{text}'"
            )
        return value

    return number


def share(text: str) -> float:
    """The `type` of an argument between 0 and 1."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"needs a number between 0 and 1, not '{text}'")
    return value


def overlap(text: str) -> float:
    """The `type` of an argument from 0 to below 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"needs a number from 0 to below 1, not '{text}'")
    return value


def _number(text: str) -> float:
    """NaN, which is in no range, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def names_in_list(text: str) -> list[str]:
    """
    The `type` of an argument with names that are separated by commas. A name with a comma is in
    double quotes, as in CSV files.
    """
    names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True))]
    if not names or not all(names):
        raise argparse.ArgumentTypeError(f"needs names with commas between them, not '{text}'")
    return names


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for what a user wants of the masks that are accepted without a look."""
    parser.add_argument(
        "--precision",
        type=share,
        default=0.95,
        metavar="P",
        help="share of the accepted masks that should be right, for the thresholds in the report "
        "(default: 0.95)",
    )
    parser.add_argument(
        "--iou",
        type=float,
        choices=[k / 100 for k in range(50, 100, 5)],
        default=0.75,
        metavar="IOU",
        help="smallest IoU of a mask that is right: 0.5, 0.55, ... 0.95 (default: 0.75)",
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for how images are read, as `dataloader.images` in a config."""
    group = parser.add_argument_group("reading images (as dataloader.images in a config)")
    scale = group.add_mutually_exclusive_group()
    for name, example in (("range", "0 4095"), ("percentiles", "0.1 99.9")):
        scale.add_argument(
            f"--intensity-{name}",
            nargs=2,
            type=float,
            metavar=("LOW", "HIGH"),
            help="which intensities become 0 and 255 in images with more than 8 bits per pixel, "
            f"such as {example}",
        )
    group.add_argument(
        "--ignore-exif", action="store_true", help="do not turn images as their EXIF data say"
    )
    group.add_argument("--max-pixels", type=int, metavar="N", help="read images of up to N pixels")


def settings_from(args: argparse.Namespace) -> "ImageSettings":
    """
    Args:
        args: of a parser with :func:`add_image_arguments`.

    Raises:
        UserError: the values make no sense.
    """
    from msrcnn_d2_runtime.image_reading import ImageSettings

    return ImageSettings(
        intensity_range=args.intensity_range,
        intensity_percentiles=args.intensity_percentiles,
        apply_exif=not args.ignore_exif,
        max_pixels=args.max_pixels,
    )


def add_predictor_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Options for a trained model that predicts, which :func:`predictor_from` takes, and those of
    :func:`add_image_arguments`.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="a checkpoint with its config beside it (config.yaml, or a .py or .yaml file of its "
        "own name); the output folder of a training; a model with published weights, such as "
        "ms_rcnn_R_50_FPN_1x; an exported .onnx file; or 'demo', the small model of drawn shapes "
        "that comes with msrcnn-d2",
    )
    group.add_argument("--config-file", metavar="FILE", help="path or name of the config")
    group.add_argument(
        "--weights", metavar="FILE", help="in place of --model, together with --config-file"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        dest="opts",
        metavar="KEY=VALUE",
        help="change the config; can be given several times",
    )
    group.add_argument(
        "--class-names",
        type=names_in_list,
        metavar="NAME,...",
        help="names of the classes, for old weights that have none",
    )
    group.add_argument(
        "--rank-by",
        choices=RANK_BY,
        help="score that predictions are sorted by (default: the first of these that there is)",
    )
    group.add_argument(
        "--device",
        metavar="DEVICE",
        help="such as cpu, cuda or cuda:1 (default: the config's, or cpu without a GPU)",
    )
    group.add_argument(
        "--amp",
        action="store_true",
        help="mixed precision: faster on a GPU, and on a CPU that computes in bfloat16",
    )
    group.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: the image in several sizes and flipped, many times the work",
    )
    group.add_argument(
        "--tile",
        type=at_least(1),
        metavar="SIZE",
        help="also predict on tiles of this size, in pixels: for small objects in large images",
    )
    group.add_argument(
        "--overlap",
        type=overlap,
        metavar="X",
        help="share of a tile that is also in the next one (default: 0.2)",
    )
    add_image_arguments(parser)


def predictor_from(
    args: argparse.Namespace, score_threshold: float | str = 0.0, tile_batch_size: int = 1
) -> "Predictor":
    """
    Args:
        args: of a parser with :func:`add_predictor_arguments`.
        score_threshold: predictions with a lower score are left out.
        tile_batch_size: how many tiles of an image the model sees at once.

    Returns:
        the predictor. For an exported .onnx file, PyTorch is not imported.

    Raises:
        UsageError, UserError: there is no such model, or it cannot be used so.
    """
    if args.tile is None and args.overlap is not None:
        raise UsageError("--overlap is that of tiles: it needs --tile SIZE.")
    settings_from(args)  # tells whether the values make sense, before the model is loaded
    predictor: Predictor
    if (args.model or "").endswith(".onnx"):
        of_others = {
            "--config-file": args.config_file,
            "--weights": args.weights,
            "--set": args.opts,
            "--class-names": args.class_names,
            "--amp": args.amp,
            "--tta": args.tta,
            "--device": args.device not in (None, "cpu") and args.device,
        }
        for option, value in of_others.items():
            if value:
                raise UsageError(f"{option} is not for exported models such as '{args.model}'.")
        from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor

        predictor = OnnxPredictor(args.model, rank_by=args.rank_by, score_threshold=score_threshold)
    else:
        from msrcnn_d2.prediction.loading import load_predictor

        predictor = load_predictor(
            args.model,
            config_file=args.config_file,
            weights=args.weights,
            opts=args.opts,
            device=args.device,
            rank_by=args.rank_by,
            score_threshold=score_threshold,
            class_names=args.class_names,
            amp=args.amp,
            tta=args.tta,
        )
    given: dict[str, Any] = {"apply_exif": False} if args.ignore_exif else {}
    if args.max_pixels is not None:
        given["max_pixels"] = args.max_pixels
    if args.intensity_range or args.intensity_percentiles:
        given["intensity_range"] = args.intensity_range
        given["intensity_percentiles"] = args.intensity_percentiles
    predictor.image_settings = dataclasses.replace(predictor.image_settings, **given)
    if args.tile is None:
        return predictor
    from msrcnn_d2_runtime.tiling import TiledPredictor

    return TiledPredictor(
        predictor,
        args.tile,
        0.2 if args.overlap is None else args.overlap,
        batch_size=tile_batch_size,
    )


def image_arguments(args: argparse.Namespace) -> list[str]:
    """The options of :func:`add_image_arguments` that were given, for another command."""
    given = []
    for name in ("range", "percentiles"):
        values = getattr(args, f"intensity_{name}")
        given += [f"--intensity-{name}", *(f"{x:g}" for x in values)] if values else []
    given += ["--ignore-exif"] if args.ignore_exif else []
    given += [] if args.max_pixels is None else ["--max-pixels", str(args.max_pixels)]
    return given
