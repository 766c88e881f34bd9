"""Cityscapes evaluation of instances that ranks masks by every score that they have."""

import copy
import glob
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from msrcnn_d2_runtime.scores import RANKINGS, SCORES, TITLES

from ..utils.errors import UserError
from .instance_results import ClassesByName
from .libraries import import_library, with_old_numpy_names

__all__ = ["MaskScoringCityscapesEvaluator"]

logger = logging.getLogger(__name__)

IMAGE_SUFFIX = "_leftImg8bit.png"
TRUTH_SUFFIX = "_gtFine_instanceIds.png"


class MaskScoringCityscapesEvaluator(ClassesByName, CityscapesInstanceEvaluator):
    """
    :class:`CityscapesInstanceEvaluator` that ranks masks by "mask_scores".

    All AP is computed by Cityscapes' own code, the package `cityscapesScripts`, which matches the
    masks with the objects once. The names of results are those of
    :class:`MaskScoringCOCOEvaluator`: "segm", "segm_by_class_score" and "segm_by_quality_score".
    Each has "AP", "AP50" and the AP of each class. There is no AP of boxes in Cityscapes.

    With an `output_dir` it writes the folder that Cityscapes' server takes:
    "cityscapes_segm_results" with, for each image, a text file of its masks, classes and mask
    scores, and the masks as PNG. A model with a calibrator also has
    "cityscapes_segm_by_quality_score_results", whose masks are the same.

    As Detectron2's, it needs a folder that all processes share.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        class_names: Sequence[str] | None = None,
    ):
        """
        Args:
            dataset_name: of a dataset with the metadata "thing_classes", "image_dir" and "gt_dir".
            output_dir: where to write; by default the files are deleted after the evaluation.
            class_names: names of the model's classes, if the dataset may have others; see
                `use_class_names`.

        Raises:
            UserError: `cityscapesScripts` is not installed; an annotated image is missing; or from
                :meth:`use_class_names`.
        """
        library = "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"
        self._library = import_library(library, "Cityscapes", "cityscapes")
        super().__init__(dataset_name)
        self._output_dir = output_dir
        gt_dir = PathManager.get_local_path(self._metadata.gt_dir)
        self._truth = sorted(glob.glob(os.path.join(gt_dir, "*", f"*{TRUTH_SUFFIX}")))
        for path in self._truth:
            # It would stop the evaluation after all images were predicted
            city, base = path.removesuffix(TRUTH_SUFFIX).split(os.sep)[-2:]
            image = os.path.join(self._metadata.image_dir, city, base + IMAGE_SUFFIX)
            if not PathManager.isfile(image):
                raise UserError(
                    f"Dataset '{dataset_name}' has no image '{image}', but annotations of it: "
                    "Cityscapes' evaluation needs the images of all annotations."
                )
        if class_names is not None:
            self.use_class_names(class_names)

    def reset(self) -> None:
        super().reset()
        self._folder = self._temp_dir
        if self._output_dir:
            self._folder = os.path.join(self._output_dir, "cityscapes_segm_results")
            if comm.is_main_process():
                shutil.rmtree(self._folder, ignore_errors=True)  # masks of an earlier evaluation
                os.makedirs(self._folder)
            comm.synchronize()
        # {path of a mask: {ranking: score}}
        self._scores: dict[str, dict[str, float]] = {}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        label_of = {label.name: label.id for label in self._library.labels}
        for image, output in zip(inputs, outputs):
            base = os.path.splitext(os.path.basename(image["file_name"]))[0]
            instances = self._in_dataset(output["instances"])
            fields = {
                name: instances.get(SCORES[name].field).tolist()
                for name in RANKINGS
                if name in SCORES and instances.has(SCORES[name].field)
            }
            lines = []
            for k, class_ in enumerate(instances.pred_classes.tolist()):
                name = self._metadata.thing_classes[class_]
                file = f"{base}_{k}_{name}.png"
                mask = instances.pred_masks[k].numpy().astype(np.uint8)
                Image.fromarray(255 * mask).save(os.path.join(self._folder, file))
                scores = {ranking: values[k] for ranking, values in fields.items()}
                self._scores[os.path.abspath(os.path.join(self._folder, file))] = scores
                score = scores.get("mask_score", scores["class_score"])
                lines.append(f"{file} {label_of[name]} {score}\n")
            with open(os.path.join(self._folder, f"{base}_pred.txt"), "w") as f:
                f.writelines(lines)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        comm.synchronize()
        gathered = comm.gather(self._scores)
        if not comm.is_main_process():
            return None
        scores = {path: values for part in gathered for path, values in part.items()}
        rankings = [r for r in RANKINGS if any(r in values for values in scores.values())]
        if self._output_dir and "quality_score" in rankings:
            self._write_other_ranking(scores, "quality_score")
        results: dict[str, dict[str, float]] = OrderedDict()
        if self._truth:
            self._evaluate_rankings(scores, rankings, results)
        else:
            logger.info("Annotations are not available for evaluation.")
        self._working_dir.cleanup()
        return results

    def _evaluate_rankings(
        self,
        scores: dict[str, dict[str, float]],
        rankings: Sequence[str],
        results: dict[str, dict[str, float]],
    ) -> None:
        logger.info("Evaluating the masks in %s ...", self._folder)
        library, args = self._library, copy.copy(self._library.args)
        args.predictionPath, args.predictionWalk = os.path.abspath(self._folder), None
        args.gtInstancesFile = os.path.join(self._temp_dir, "gtInstances.json")
        args.quiet = True
        with with_old_numpy_names(library):
            # The steps of the library's evaluateImgLists, which would match anew for each ranking,
            # and write all matches into the current folder, where it fails with NumPy 2
            library.setInstanceLabels(args)
            predicted = [library.getPrediction(path, args) for path in self._truth]
            objects = library.getGtInstances(self._truth, args)
            matches = library.matchGtWithPreds(predicted, self._truth, objects, args)
        # A model without mask scores has Detectron2's ranking
        main = "mask_score" if "mask_score" in rankings else "class_score"
        for name in sorted(rankings, key=lambda name: name != main) or [main]:
            for detection in _detections_in(matches):
                detection["confidence"] = scores[detection["imgName"]][name]
            averages = library.computeAverages(library.evaluateMatches(matches, args), args)
            numbers = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
            numbers |= {f"AP-{k}": v["ap"] for k, v in averages["classes"].items()}
            task = "segm" if name == main else f"segm_by_{name}"
            results[task] = {k: 100 * float(v) for k, v in numbers.items()}
            logger.info("Masks ranked by %s:\n%s", TITLES[name], create_small_table(results[task]))

    def _write_other_ranking(self, scores: dict[str, dict[str, float]], name: str) -> None:
        folder = os.path.join(str(self._output_dir), f"cityscapes_segm_by_{name}_results")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._folder, folder)
        for path in glob.glob(os.path.join(glob.escape(folder), "*_pred.txt")):
            with open(path) as f:
                lines = [line.split() for line in f]
            with open(path, "w") as f:
                for file, label, _ in lines:
                    score = scores[os.path.abspath(os.path.join(self._folder, file))][name]
                    f.write(f"{file} {label} {score}\n")


def _detections_in(matches: dict[str, Any]) -> list[dict]:
    """All detections, and their copies beside the objects that they overlap."""
    found = []
    for image in matches.values():
        found += [d for detections in image["prediction"].values() for d in detections]
        objects = [o for objects in image["groundTruth"].values() for o in objects]
        found += [d for o in objects for d in o["matchedPred"]]
    return found
