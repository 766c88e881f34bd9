"""What our evaluators share: classes found by name, and results with every score."""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from msrcnn_d2_runtime.scores import MASK_IOU_PROBS, SCORES

from ..class_names import match, obstacle, same
from ..utils.errors import UserError
from .mask_encoding import encode_predicted_masks

__all__ = ["ClassesByName", "InstanceResults", "check_limit"]

logger = logging.getLogger(__name__)


class ClassesByName:
    """Put before an evaluator of Detectron2, this finds the model's classes in the dataset."""

    _metadata: Any
    _class_in_dataset: torch.Tensor | None = None

    def use_class_names(self, class_names: Sequence[str]) -> None:
        """
        Find the model's classes in the dataset by name. Predictions of classes that the dataset
        does not have are left out; objects of classes that the model does not know are missed.

        Args:
            class_names: names of the model's classes, in their order.

        Raises:
            UserError: the names are the same in another order, or have none in common.
        """
        own = self._own_class_names()
        self._class_in_dataset = None
        if not own or same(own, class_names):
            return
        dataset = f"dataset '{self._metadata.get('name')}'"
        why_not = obstacle("the model", class_names, dataset, own)
        if why_not:
            raise UserError(
                f"{why_not} Evaluate on annotations with the model's names, in the order of their "
                "ids."
            )
        positions = match(class_names, own)
        self._class_in_dataset = torch.tensor([-1 if k is None else k for k in positions])
        left_out = [name for name, k in zip(class_names, positions) if k is None]
        if left_out:
            logger.info(
                "Predictions of classes that %s does not have are left out: %s.",
                *(dataset, ", ".join(left_out)),
            )
        unknown = [name for name in own if name not in class_names]
        if unknown:
            logger.warning(
                "The model does not know these classes of %s. Their objects count as missed: %s.",
                *(dataset, ", ".join(unknown)),
            )

    def _own_class_names(self) -> Sequence[str] | None:
        return self._metadata.get("thing_classes")

    def _in_dataset(self, instances: Instances) -> Instances:
        """Predictions on the CPU, with "pred_classes" of the dataset, of classes that it has."""
        instances = instances.to("cpu")
        if self._class_in_dataset is not None:
            classes = self._class_in_dataset[instances.pred_classes]
            instances = instances[classes >= 0]
            instances.pred_classes = classes[classes >= 0]
        return instances


class InstanceResults(ClassesByName):
    """
    Put before `COCOEvaluator` or `LVISEvaluator`, this gives every result all scores of the model,
    encodes masks fast, and writes the files that a server takes.
    """

    file_prefix: str
    _predictions: list[dict]
    _output_dir: Any
    _do_evaluation: bool

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for image, output in zip(inputs, outputs):
            if "instances" not in output:
                super().process([image], [output])  # type: ignore[misc]
                continue
            instances = self._in_dataset(output["instances"])
            # The base class would paste and encode masks one by one, so it sees none
            fields = {k: v for k, v in instances.get_fields().items() if k != "pred_masks"}
            without_masks = Instances(instances.image_size, **fields)
            super().process([image], [{**output, "instances": without_masks}])  # type: ignore[misc]
            results = self._predictions[-1]["instances"]
            if instances.has("pred_masks"):
                for result, rle in zip(results, encode_predicted_masks(instances)):
                    result["segmentation"] = rle
            for score in SCORES.values():
                if score.key != "score" and instances.has(score.field):
                    for result, value in zip(results, instances.get(score.field).tolist()):
                        result[score.key] = value
            if instances.has(MASK_IOU_PROBS):
                for result, probs in zip(results, instances.get(MASK_IOU_PROBS).tolist()):
                    result[MASK_IOU_PROBS] = [round(p, 6) for p in probs]  # for a smaller file

    def _prepared_results(self, predictions: list[dict]) -> list[dict] | None:
        """All results, which are written to files; None if there are no annotations."""
        logger.info("Preparing results ...")
        results = self._with_dataset_categories(predictions)
        if self._output_dir:
            self._write_files(results)
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return None
        return results

    def _with_dataset_categories(self, predictions: list[dict]) -> list[dict]:
        """Copies of all results, with category ids of the dataset instead of classes."""
        results = [dict(r) for x in predictions for r in x["instances"]]
        classes = self._classes_of_categories()
        if classes is None:
            return results
        categories = {class_: category for category, class_ in classes.items()}
        for result in results:
            class_ = result["category_id"]
            if class_ not in categories:
                raise ValueError(
                    f"A prediction has class {class_}, but the dataset has {len(categories)} "
                    "classes, counted from 0: set the number of classes of the model to that."
                )
            result["category_id"] = categories[class_]
        return results

    def _classes_of_categories(self) -> dict[int, int] | None:
        """The class of each category id; None if classes are category ids."""
        return self._metadata.get("thing_dataset_id_to_contiguous_id")

    def _write_files(self, results: list[dict]) -> None:
        logger.info("Saving results to %s", self._output_dir)
        prefix = self.file_prefix
        files = {f"{prefix}_instances_results.json": results}
        # A server takes boxes and masks, each with the score that they are ranked by
        if any("bbox" in r for r in results):
            files[f"{prefix}_bbox_results.json"] = [
                {k: r[k] for k in ("image_id", "category_id", "bbox", "score")} for r in results
            ]
        by_score = {f"{prefix}_segm_results.json": "mask_score"}
        if any("quality_score" in r for r in results):
            by_score[f"{prefix}_segm_by_quality_score_results.json"] = "quality_score"
        for name, key in by_score.items() if any("segmentation" in r for r in results) else ():
            files[name] = [
                {
                    **{k: r[k] for k in ("image_id", "category_id", "segmentation")},
                    "score": r.get(key, r["score"]),
                }
                for r in results
            ]
        for name, entries in files.items():
            with PathManager.open(os.path.join(self._output_dir, name), "w") as f:
                f.write(json.dumps(entries))


def check_limit(limit: object) -> None:
    """
    Raises:
        ValueError: it is no limit on the number of detections.
    """
    if type(limit) is not int or limit < 1:
        raise ValueError(f"max_dets_per_image is a whole number from 1 on, not {limit!r}.")
