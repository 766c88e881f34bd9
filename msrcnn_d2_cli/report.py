"""
Write a report on what the mask scores of a model are worth, from its predictions in COCO's format.

The predictions may come from any model. Without mask scores the report shows what the class scores
say about the masks, and what better scores could bring.
"""

import argparse
from collections import Counter
from pathlib import Path

from .parsing import (
    ENGINES,
    add_image_arguments,
    add_precision_arguments,
    at_least,
    settings_from,
)

USAGE = "RESULTS.json ANNOTATIONS.json [options]"
EXAMPLES = """
  the predictions that `msrcnn-d2 evaluate` has written (it writes this report as well):
    {prog} output/inference/coco_instances_results.json \\
      annotations/instances_val2017.json --images val2017
  those of any other model, in COCO's result format with masks as RLE or polygons:
    {prog} results.segm.json annotations/instances_val2017.json
  from which score on are 9 of 10 masks right, with an IoU of at least 0.5?
    {prog} results.segm.json annotations/instances_val2017.json --precision 0.9 --iou 0.5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        metavar="RESULTS.json",
        help='list of predictions with "image_id", "category_id", "score", "segmentation" and, if '
        'the model predicts them, "pred_mask_iou", "mask_score", "quality_score", "expected_iou", '
        '"mask_iou_probs"',
    )
    parser.add_argument(
        "annotations", metavar="ANNOTATIONS.json", help="ground truth in COCO's format"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of images, to show some")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="folder to write (default: report)",
    )
    parser.add_argument("--title", help="title of the page (default: the name of RESULTS.json)")
    add_precision_arguments(parser)
    parser.add_argument(
        "--max-dets",
        type=at_least(1),
        metavar="N",
        help="count the N best predictions of each class in each image (default: 100, as in COCO, "
        "or as many as the image with the most predictions has)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="library that counts AP (default: what is installed)",
    )
    add_image_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from msrcnn_d2.coco_format import check_fits, read_annotations, read_results
    from msrcnn_d2.evaluation.average_precision import choose_engine
    from msrcnn_d2.evaluation.federated import in_terms_of_coco, is_federated
    from msrcnn_d2.evaluation.mask_quality import limit_of, measure_mask_quality
    from msrcnn_d2.report import write_report
    from msrcnn_d2.utils.errors import UserError

    settings = settings_from(args)
    if args.images and not args.images.is_dir():
        raise UserError(f"There is no folder '{args.images}': give that of the images.")
    try:
        engine = choose_engine(args.engine)
    except ValueError as error:  # it is not installed
        raise UserError(str(error)) from error
    print(f"Reading {args.results} and {args.annotations} ...", flush=True)
    coco_gt = read_annotations(args.annotations)
    results = check_fits(read_results(args.results), coco_gt)
    if is_federated(coco_gt):
        number = len(results)
        coco_gt, results = in_terms_of_coco(coco_gt, results)
        print(
            "The annotations are LVIS's. Predictions of categories that an image was not searched "
            f"for do not count: {number - len(results):,} of {number:,}."
        )
        if not results:
            raise UserError("None of the predictions is of a category that its image has.")
    max_dets = args.max_dets or limit_of(results)
    warn_of_more_than(max_dets, results)
    print(f"Evaluating {len(results):,} predictions ...", flush=True)
    quality = measure_mask_quality(coco_gt, results, engine, max_dets)
    print(f"\n{quality.table()}\n\nDrawing ...", flush=True)
    title = args.title or f"Masks of {Path(args.results).name}"
    images = args.images and str(args.images)
    page = write_report(quality, args.output, title, images, settings, args.precision, args.iou)
    print(f"report: {page}")


def warn_of_more_than(max_dets: int, results: list[dict]) -> None:
    """A crowded image would lose objects to the limit without a word."""
    counts = Counter((r["image_id"], r["category_id"]) for r in results)
    most = max(counts.values())
    if most > max_dets:
        print(
            f"An image has {most} predictions of one class, of which the best {max_dets} count; "
            f"--max-dets {most} counts all of them."
        )
