"""
Fit calibrated scores to a trained Mask R-CNN or Mask Scoring R-CNN, without training it.

The model predicts on annotated images, and a small network learns from the result how likely a mask
is good: the probability that its IoU is at least 0.50, 0.55, ..., 0.95. The mean of these is the
calibrated score. It usually ranks masks better than class score and mask score do; where it would
not, the ranking stays as it is. Start with 100 images; more are better. The images that the model
was trained on may be used, but a precision that is to hold on new images needs others. Never use
those that you report results of.

It writes model.pth, the weights with the calibrator; config.yaml, a config that uses them; and into
calibration/ a report on what the new scores are worth on images that they were not fitted to.
"""

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from .parsing import add_precision_arguments, at_least
from .train import add_run_arguments, read_config, start_processes

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from detectron2.config import CfgNode

    from msrcnn_d2.calibration import Calibration

USAGE = "--config-file FILE --weights FILE [options] [KEY=VALUE ...]"
EXAMPLES = """
  a model of yours, on the images that it was trained on:
    {prog} --config-file output/config.yaml --weights output/model_final.pth \\
      --dataset my_train train.json images/ --output output/calibrated
  evaluate it:
    msrcnn-d2 evaluate --config-file output/calibrated/config.yaml \\
      --dataset my_val val.json images/ dataloader.test.dataset.names=my_val
  a Mask R-CNN of Detectron2's model zoo, on 1,000 images of COCO:
    {prog} --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml \\
      --weights mask_rcnn.pth --on coco_2017_train --output calibrated
  from which score on are 9 of 10 masks right, with an IoU of at least 0.5?
    {prog} ... --precision 0.9 --iou 0.5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, weights="the trained weights")
    parser.add_argument(
        "--on",
        metavar="NAME",
        help="dataset to fit to (default: that of --dataset, or else the one that the config "
        "trains on)",
    )
    parser.add_argument(
        "--max-images",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="use a random sample of N images if there are more (default: 1000)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("calibrated"),
        metavar="DIR",
        help="folder to write (default: calibrated)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the sample and the fit (default: 0)"
    )
    add_precision_arguments(parser)


def run(args: argparse.Namespace) -> None:
    start_processes(run_process, args)


def run_process(args: argparse.Namespace) -> None:
    """What each process does."""
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from msrcnn_d2.calibration import calibrate
    from msrcnn_d2.utils.errors import UserError, agree_on_user_errors, exit_on_user_error

    with exit_on_user_error():
        for name in ("detectron2", "fvcore", "msrcnn_d2"):
            setup_logger(distributed_rank=comm.get_rank(), name=name)
        with agree_on_user_errors():
            cfg = read_config(args)
            dataset = args.on
            if dataset is None and len(args.dataset) > 1:
                names = ", ".join(name for name, *_ in args.dataset)
                raise UserError(f"Which dataset is to be fitted to, of {names}? Name it by --on.")
            if dataset is None and args.dataset:
                dataset = args.dataset[0][0]
            if comm.is_main_process():
                prepare(args.output)
        calibration = calibrate(cfg, dataset, max_images=args.max_images, seed=args.seed)
        if calibration is not None:
            show(calibration, args)


def prepare(folder: Path) -> None:
    """Find out whether the folder can be written before the model runs for minutes."""
    from msrcnn_d2.utils.errors import UserError

    for file in ("model.pth", "config.yaml"):
        if (folder / file).exists():
            raise UserError(
                f"'{folder}' has a {file} already, of a calibration or a training: give another "
                "folder with --output."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.pth").touch()
        (folder / "model.pth").unlink()
    except OSError as error:
        raise UserError(
            f"Cannot write into '{folder}' ({error.strerror}): give another folder with --output."
        ) from error


def show(calibration: "Calibration", args: argparse.Namespace) -> None:
    """Print what the scores are worth, and write everything."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from msrcnn_d2.calibration.calibrate import MIN_IMAGES
    from msrcnn_d2.report import write_report

    print(
        f"\nFitted to {calibration.num_detections:,} detections in {calibration.num_images:,} "
        f"images of '{calibration.dataset}'."
    )
    if calibration.with_network:
        print("For the table, each image got its scores from a calibrator that had not seen it.")
    print(f"\n{calibration.quality.table()}")
    if not calibration.with_network:
        ap = calibration.quality.overall.ap
        if math.isnan(calibration.ap_of_network):
            reason = f"fewer than {MIN_IMAGES} images do not tell what is better"
        else:
            reason = (
                f"new scores would reach a mask AP of {calibration.ap_of_network:.2f}, not "
                f"{ap.get('mask_score', ap['class_score']):.2f}"
            )
        print(
            f"\nThere is too little data to rank masks better: {reason}. So the ranking stays as "
            "it was, and only the probabilities are calibrated. More annotated images help."
        )
    print(f"\n{answer(calibration, args)}")
    config = calibration.write(args.output)
    root = MetadataCatalog.get(calibration.dataset).get("image_root")
    title = f"Calibrated scores on {calibration.dataset}"
    page = write_report(
        calibration.quality,
        args.output / "calibration",
        title,
        root,
        None,
        args.precision,
        args.iou,
    )
    print(f"\nweights: {args.output / 'model.pth'}\nconfig:  {config}\nreport:  {page}")
    datasets = [f"--dataset {shlex.join(map(str, x))}" for x in args.dataset]
    for name in names_in(calibration.cfg, "dataloader.test.dataset.names"):
        if name not in DatasetCatalog.list():
            datasets.append(f"--dataset {shlex.quote(name)} ANNOTATIONS.json IMAGES/")
    command = shlex.join(["msrcnn-d2", "evaluate", "--config-file", str(config)])
    print(f"\nTo evaluate the model: {' '.join([command, *datasets])}")


def names_in(cfg: "DictConfig | CfgNode", key: str) -> list[str]:
    """The datasets that a config of either kind names."""
    from msrcnn_d2.engine.configs import value_of

    names = value_of(cfg, key) or ()
    return [names] if isinstance(names, str) else list(names)


def answer(calibration: "Calibration", args: argparse.Namespace) -> str:
    """Where to accept, to look and to drop, for the precision that the user wants."""
    from msrcnn_d2.report.thresholds import thresholded_scores

    wanted = f"P(IoU >= {args.iou:.2f})"
    point = thresholded_scores(calibration.quality, args.precision, args.iou)[-1].point
    percent = f"{100 * args.precision:g} %"
    if math.isnan(point.highest):
        lines = ["There are too few detections to tell from which probability on masks are right."]
    elif point.accept is None:
        lines = [
            f"No threshold on {wanted} makes {percent} of the masks right; the highest precision "
            f"is {100 * point.highest:.1f} %, from {point.highest_at:g} on."
        ]
    else:
        low, high = (100 * x for x in point.accepted.interval)
        lines = [
            f"Masks with {wanted} of {point.accept:g} or more: {percent} or more are right "
            f"({100 * point.accepted.precision:.1f} %, 95 % confidence {low:.1f} to {high:.1f}). "
            f"These are {100 * point.accepted.of_detections:.0f} % of the detections, and find "
            f"{100 * point.accepted.of_objects:.0f} % of the objects.",
        ]
        if round(100 * args.precision, 6).is_integer():  # only these are kept with the model
            lines.append(
                f"In Python: MaskScoringPredictor(cfg, score_threshold="
                f'"p{100 * args.precision:.0f}@{100 * args.iou:.0f}").'
            )
    if point.drop is not None:
        lines.append(
            f"Below {point.drop:g}, {100 * (1 - point.dropped.precision):.1f} % are wrong: drop "
            f"them, {100 * point.dropped.of_detections:.0f} % of the detections."
        )
    trained_on = names_in(calibration.cfg, "dataloader.train.dataset.names")
    if point.accept is not None and calibration.dataset in trained_on:
        lines.append(
            "The config trains on these images. A model finds objects that it knows more precisely "
            "than new ones, so fit to held-out images if the precision has to hold."
        )
    return "\n".join(lines)
