"""
Write a report on what the mask scores of a model are worth, from its predictions in COCO's format.

The predictions may come from any model, also from one without mask scores: then the report shows
what its class scores say about its masks, and what better scores could bring.
"""

import argparse
from collections import Counter
from pathlib import Path

from ..coco_format import check_fits, read_annotations, read_results
from ..evaluation.average_precision import ENGINES, choose_engine
from ..evaluation.mask_quality import limit_of, measure_mask_quality
from ..image_reading import add_image_arguments, settings_from
from ..utils.errors import UserError, exit_on_user_error
from .page import write_report

EXAMPLES = """
examples:
  the predictions that `train_net.py --eval-only` has written (it writes this report as well):
    python -m msrcnn_d2.report output/inference/coco_instances_results.json \\
      annotations/instances_val2017.json --images val2017
  those of any other model, in COCO's result format with masks as RLE or polygons:
    python -m msrcnn_d2.report results.segm.json annotations/instances_val2017.json
"""


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
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
        max_dets = args.max_dets or limit_of(results)
        warn_of_more_than(max_dets, results)
        print(f"Evaluating {len(results):,} predictions ...", flush=True)
        quality = measure_mask_quality(coco_gt, results, engine, max_dets)
        print(f"\n{quality.table()}\n\nDrawing ...", flush=True)
        title = args.title or f"Masks of {Path(args.results).name}"
        images = args.images and str(args.images)
        page = write_report(quality, args.output, title, images, settings)
        print(f"report: {page}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m msrcnn_d2.report",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        metavar="RESULTS.json",
        help='list of predictions with "image_id", "category_id", "score", "segmentation" and, if '
        'the model scores masks, "pred_mask_iou" and "mask_score"',
    )
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="ground truth of COCO kind")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of images, to show some")
    parser.add_argument(
        "--output", type=Path, default=Path("report"), metavar="DIR", help="folder (default report)"
    )
    parser.add_argument("--title", help="of the page (default: the name of RESULTS.json)")
    parser.add_argument(
        "--max-dets",
        type=int,
        metavar="N",
        help="of each image, so many predictions of each class count (default 100, as in COCO, or "
        "as many as the image with the most predictions has)",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, help="what counts AP (default: the first that is installed)"
    )
    add_image_arguments(parser)
    args = parser.parse_args()
    if args.max_dets is not None and args.max_dets < 1:
        parser.error("--max-dets must be at least 1")
    return args


def warn_of_more_than(max_dets: int, results: list[dict]) -> None:
    """The limit is COCO's; a crowded image loses objects to it without a word."""
    counts = Counter((r["image_id"], r["category_id"]) for r in results)
    most = max(counts.values())
    if most > max_dets:
        print(
            f"An image has {most} predictions of one class, of which the best {max_dets} count; "
            f"--max-dets {most} counts all of them."
        )


if __name__ == "__main__":
    main()
