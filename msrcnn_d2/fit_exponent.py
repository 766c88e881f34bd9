"""
Fit how much the predicted IoU counts in the ranking of masks: class score x mask IoU ** exponent.

In the paper the exponent is 1, and 0 leaves the class score alone. Which one is best depends on how
well the MaskIoU head of a model has learned, and mask AP of predictions tells it without training.

Never fit on the images that you report results of: their AP would be too good. Hold out a part of
the training images, as a dataset of its own that is neither trained on nor reported:

  python train_net.py --config-file CONFIG.py --dataset rest rest.json images/ \\
      dataloader.train.dataset.names=rest train.output_dir=output/run
  python train_net.py --config-file CONFIG.py --dataset held_out held_out.json images/ \\
      dataloader.test.dataset.names=held_out train.output_dir=output/fit \\
      --eval-only train.init_checkpoint=output/run/model_final.pth
  python -m msrcnn_d2.fit_exponent output/fit/inference/coco_instances_results.json \\
      held_out.json --checkpoint output/run/model_final.pth --output output/run/model_fitted.pth

(yaml: DATASETS.TRAIN "('rest',)" OUTPUT_DIR output/run; DATASETS.TEST "('held_out',)" OUTPUT_DIR
output/fit MODEL.WEIGHTS output/run/model_final.pth.) Models take the exponent from
model_fitted.pth as they take its weights.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pycocotools.coco import COCO
from tabulate import tabulate
from tqdm import tqdm

from .checkpoint.compatibility import MASK_IOU_HEAD
from .checkpoint.conversion import SCORE_EXPONENT, Weights, check_finite, read_weights
from .checkpoint.fetching import find_file
from .checkpoint.writing import WRITERS, check_target, write_weights
from .coco_format import check_fits, read_annotations, read_results
from .evaluation.average_precision import ENGINES, build_engine
from .evaluation.mask_quality import limit_of
from .utils.errors import UserError, exit_on_user_error

__all__ = ["EXPONENTS", "ExponentFit", "fit_exponent"]

EXPONENTS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
CLASS_SCORE, PAPER = 0.0, 1.0  # what every fit is compared with


@dataclass
class ExponentFit:
    """
    Attributes:
        exponent: the best one.
        curve: for each exponent, ascending, "AP" (mean over IoU 0.50:0.95), "AP50" and "AP75" of
            masks in percent.
    """

    exponent: float
    curve: dict[float, dict[str, float]]

    @property
    def gain(self) -> float:
        """Mask AP, in percent, above that of the paper's exponent."""
        return self.curve[self.exponent]["AP"] - self.curve[PAPER]["AP"]


def fit_exponent(
    coco_gt: COCO,
    results: Sequence[dict],
    exponents: Sequence[float] = EXPONENTS,
    max_dets: int = 100,
    engine: str | None = None,
    progress: bool = False,
) -> ExponentFit:
    """
    Find the exponent of the mask IoU that ranks masks best.

    Args:
        coco_gt: the ground truth of images that the model was not trained on, and that no result
            is reported of.
        results: detections of a mask-scoring model in COCO's result format, with "score" (the
            class score), "pred_mask_iou" and "segmentation" (compressed RLE).
        exponents: to try, besides 0 and 1.
        max_dets: of each image, only so many of each class count, the best ones.
        engine: "faster-coco-eval", "pycocotools", or None for the first one that is installed.
        progress: whether to show a bar.

    Returns:
        the exponent of the highest mask AP, with the AP of all. Of equals it is the one nearest to
        1, as a ratio; 0 is farther away than any other.

    Raises:
        UserError: an exponent is not a finite number of at least 0, results lack "pred_mask_iou",
            or there is no object to find.
        ValueError: from :func:`build_engine`.
    """
    grid = _grid(exponents)
    scores, ious = _scores_and_ious(results)
    ranking = build_engine(coco_gt, results, "segm", engine, [max_dets])
    curve = {}
    for exponent in tqdm(grid, desc="exponents", leave=False, disable=not progress):
        factors = ious if exponent == PAPER else ious**exponent
        numbers = ranking.evaluate((scores * factors).tolist()).numbers
        curve[exponent] = {name: 100 * numbers[name] for name in ("AP", "AP50", "AP75")}
    if math.isnan(curve[PAPER]["AP"]):
        raise UserError(
            "The annotations have no object to find but crowds: give those of the images that were "
            "predicted on."
        )
    return ExponentFit(min(grid, key=lambda x: _rank(x, curve[x]["AP"])), curve)


def _grid(exponents: Sequence[float]) -> list[float]:
    for exponent in exponents:
        _check_exponent(exponent)
    return sorted({CLASS_SCORE, PAPER, *map(float, exponents)})


def _check_exponent(exponent: float) -> None:
    if not (math.isfinite(exponent) and exponent >= 0):
        raise UserError(f"An exponent is a finite number of at least 0, not {exponent:g}.")


def _scores_and_ious(results: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class scores and predicted IoUs, float64 of shape (N,)."""
    if not results:
        raise UserError("There are no predictions to rank.")
    ious = [r.get("pred_mask_iou") for r in results]
    if any(iou is None for iou in ious):
        raise UserError(
            "The predictions have no 'pred_mask_iou', so they come from a plain Mask R-CNN, or are "
            "meant for a COCO server: give inference/coco_instances_results.json of a "
            "mask-scoring model."
        )
    if not all(isinstance(iou, (int, float)) and 0 <= iou <= 1 for iou in ious):
        raise UserError("A 'pred_mask_iou' of the predictions is not a number from 0 to 1.")
    scores = torch.tensor([r["score"] for r in results], dtype=torch.float64)
    return scores, torch.tensor(ious, dtype=torch.float64)


def _rank(exponent: float, ap: float) -> tuple[float, float, float]:
    """Ascending from the best: by AP up to rounding, then by the ratio to 1, then the smaller."""
    distance = abs(math.log(exponent)) if exponent else math.inf
    return -round(ap, 9), distance, exponent


# ---- python -m msrcnn_d2.fit_exponent


def main() -> None:
    args = _parser().parse_args()
    with exit_on_user_error():
        _check_combination(args)
        weights = _weights_to_change(args.checkpoint, args.output) if args.output else None
        exponent = args.exponent
        if exponent is None:
            exponent = _fit_and_report(args)
        if weights is not None:
            _write(weights, exponent, args.output)
        else:
            print(f"To use it, set {_settings(exponent)}, or write it to a checkpoint: see --help.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m msrcnn_d2.fit_exponent",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        metavar="RESULTS.json",
        nargs="?",
        help="predictions over held-out images, which `train_net.py --eval-only` writes as "
        "inference/coco_instances_results.json",
    )
    parser.add_argument(
        "annotations",
        metavar="ANNOTATIONS.json",
        nargs="?",
        help="ground truth of those images, in COCO's format",
    )
    parser.add_argument("--checkpoint", metavar="IN", help="file, URL, or name of the model zoo")
    parser.add_argument(
        "--output",
        metavar="OUT",
        help=f"copy of the checkpoint to write, with the exponent: {', '.join(WRITERS)}",
    )
    parser.add_argument(
        "--exponent",
        metavar="G",
        type=float,
        help="write this one without a fit; 1 takes a fit back",
    )
    parser.add_argument(
        "--exponents",
        metavar="G",
        type=float,
        nargs="+",
        default=EXPONENTS,
        help=f"to try besides 0 and 1, by default {' '.join(f'{x:g}' for x in EXPONENTS)}",
    )
    parser.add_argument(
        "--max-dets",
        metavar="N",
        type=int,
        help="of each image and class, the N best count, by default 100, or as many as the image "
        "with the most predictions has",
    )
    parser.add_argument("--engine", choices=ENGINES, help="by default the first that is installed")
    return parser


def _check_combination(args: argparse.Namespace) -> None:
    if (args.checkpoint is None) != (args.output is None):
        raise UserError("Give --checkpoint IN and --output OUT together, or neither.")
    if args.exponent is not None:
        _check_exponent(args.exponent)
        if args.output is None:
            raise UserError("--exponent writes to a checkpoint: give --checkpoint and --output.")
        if args.results is not None:
            raise UserError("--exponent replaces a fit: leave RESULTS.json out, or --exponent.")
    elif args.annotations is None:
        raise UserError(
            "Give RESULTS.json and ANNOTATIONS.json, predictions and truth of held-out images, to "
            "fit an exponent, or --exponent to write one."
        )
    if args.max_dets is not None and args.max_dets < 1:
        raise UserError(f"--max-dets is at least 1, not {args.max_dets}.")


def _weights_to_change(checkpoint: str, output: str) -> Weights:
    """Read before the fit, so that it is not in vain."""
    check_target(output, checkpoint)
    file = find_file(checkpoint)
    check_target(output, file)
    weights = read_weights(file)
    check_finite(weights.state_dict, checkpoint)
    if not any(k.startswith(MASK_IOU_HEAD) and k != SCORE_EXPONENT for k in weights.state_dict):
        raise UserError(
            f"'{checkpoint}' ({weights.source}) has no mask IoU head, whose exponent it is: give "
            "the checkpoint of the mask-scoring model that made the predictions."
        )
    return weights


def _fit_and_report(args: argparse.Namespace) -> float:
    coco_gt = read_annotations(args.annotations)
    results = check_fits(read_results(args.results), coco_gt)
    try:
        fit = fit_exponent(
            coco_gt,
            results,
            args.exponents,
            args.max_dets or limit_of(results),
            args.engine,
            progress=True,
        )
    except ValueError as error:  # an engine that is not installed
        raise UserError(str(error)) from error
    predicted = len({r["image_id"] for r in results})
    print(f"{len(results)} predictions in {predicted} of {len(coco_gt.imgs)} annotated images:\n")
    print(_table(fit))
    print(f"\n{_conclusion(fit)}")
    return fit.exponent


def _table(fit: ExponentFit) -> str:
    known = {CLASS_SCORE: "class score alone", PAPER: "the paper"}
    rows = []
    for exponent, numbers in fit.curve.items():
        notes = [known[exponent]] if exponent in known else []
        notes += ["chosen"] if exponent == fit.exponent else []
        ap = [f"{value:.2f}" for value in numbers.values()]
        rows.append([f"{exponent:g}", *ap, ", ".join(notes)])
    headers = ["exponent", "mask AP", "AP50", "AP75", ""]
    align = ("right", "right", "right", "right", "left")
    return tabulate(rows, headers, "github", colalign=align, disable_numparse=True)


def _conclusion(fit: ExponentFit) -> str:
    text = f"Chosen: {fit.exponent:g}, mask AP {fit.gain:+.2f} compared with the paper's 1."
    if fit.exponent == max(fit.curve):
        text += " It is the largest that was tried: try larger ones with --exponents."
    return text


def _settings(exponent: float) -> str:
    return (
        f"model.roi_heads.mask_iou_head.score_exponent={exponent:g} (yaml: "
        # yacs takes no whole number for the key
        f"MODEL.ROI_MASK_IOU_HEAD.SCORE_EXPONENT {float(f'{exponent:g}')})"
    )


def _write(weights: Weights, exponent: float, output: str) -> None:
    value = torch.tensor(exponent, dtype=torch.float32)
    state_dict = {**weights.state_dict, SCORE_EXPONENT: value}
    write_weights(state_dict, output, class_names=weights.class_names)
    if weights.note:
        print(f"Note: {weights.note}")
    print(
        f"Wrote '{output}': models that load it rank masks by class score x mask IoU ** "
        f"{exponent:g}, unless their config sets an exponent."
    )


if __name__ == "__main__":
    main()
