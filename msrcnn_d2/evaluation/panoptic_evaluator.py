"""Panoptic quality."""

import itertools
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .libraries import import_library

__all__ = ["PanopticQualityEvaluator"]

logger = logging.getLogger(__name__)

# In the results of the library, and at the end of names in those of Detectron2
GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}


class PanopticQualityEvaluator(COCOPanopticEvaluator):
    """
    :class:`COCOPanopticEvaluator` that computes panoptic quality (PQ) by hotcoco. Detectron2 uses
    `panopticapi`, which is not on PyPI. Both give the same numbers.

    The results are those of the base class: {"panoptic_seg": {"PQ": ..., "SQ", "RQ", "PQ_th", ...,
    "RQ_st"}}, in percent. They are NaN where there is nothing to evaluate, such as "PQ_st" if the
    dataset has no stuff.

    With an `output_dir` it writes what a server for COCO's panoptic task takes: "predictions.json"
    and the PNG files in "predictions/".
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        """
        Args:
            dataset_name: of a dataset that is registered with Detectron2's
                `register_coco_panoptic_separated`, or has the same metadata.
            output_dir: where to write the predictions; None for nowhere.

        Raises:
            UserError: hotcoco is not installed.
            ValueError: the annotations are not there.
        """
        library = import_library("hotcoco.panoptic", "panoptic segmentation", "panoptic")
        self._evaluation_of_files = library.PanopticEval
        super().__init__(dataset_name, output_dir)
        for path in (self._metadata.panoptic_json, self._metadata.panoptic_root):
            if not PathManager.exists(path):
                raise ValueError(
                    f"the panoptic annotations of dataset '{dataset_name}' are not at '{path}'"
                )

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """
        Args:
            inputs: with "file_name" and "image_id".
            outputs: with "panoptic_seg" as from :class:`PanopticFPN`, which stay as they are.
        """
        for image, output in zip(inputs, outputs):
            segments, segments_info = output["panoptic_seg"]
            ids = segments.cpu().numpy()
            # COCO's colour of a segment: its id is R + 256 G + 256^2 B
            colors = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1)
            png = BytesIO()
            Image.fromarray(colors.astype(np.uint8)).save(png, format="PNG")
            self._predictions.append(
                {
                    "image_id": image["image_id"],
                    "file_name": f"{Path(image['file_name']).stem}.png",
                    "png_string": png.getvalue(),
                    "segments_info": [self._convert_category_id(dict(x)) for x in segments_info],
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """
        Returns:
            the results on the main process, None on others.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = list(itertools.chain(*gathered))
        with TemporaryDirectory(prefix="panoptic_eval") as temporary:
            found = self._pq(predictions, Path(self._output_dir or temporary))
        numbers = {
            f"{name}{suffix}": 100 * found[group][name.lower()] if found[group]["n"] else math.nan
            for group, suffix in GROUPS.items()
            for name in ("PQ", "SQ", "RQ")
        }
        rows = [
            [group, *(numbers[f"{name}{suffix}"] for name in ("PQ", "SQ", "RQ")), found[group]["n"]]
            for group, suffix in GROUPS.items()
        ]
        logger.info(
            "Panoptic quality:\n%s",
            tabulate(rows, ["", "PQ", "SQ", "RQ", "categories"], tablefmt="github", floatfmt=".2f"),
        )
        return OrderedDict(panoptic_seg=numbers)

    def _pq(self, predictions: list[dict], folder: Path) -> dict[str, Any]:
        """
        Args:
            predictions: of all images.
            folder: for their files.

        Returns:
            of each group {"pq", "sq", "rq": from 0 to 1, "n": number of categories}.
        """
        truth_json = PathManager.get_local_path(self._metadata.panoptic_json)
        pngs, predictions_json = folder / "predictions", folder / "predictions.json"
        pngs.mkdir(exist_ok=True)
        for prediction in predictions:
            (pngs / prediction["file_name"]).write_bytes(prediction.pop("png_string"))
        content = json.loads(Path(truth_json).read_text())
        predictions_json.write_text(json.dumps({**content, "annotations": predictions}))
        evaluation = self._evaluation_of_files(
            truth_json,
            predictions_json,
            gt_folder=PathManager.get_local_path(self._metadata.panoptic_root),
            pred_folder=pngs,
        )
        evaluation.evaluate()
        return evaluation.results()
