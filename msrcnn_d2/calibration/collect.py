"""Run a model over images, and keep what a calibrator needs of each detection."""

import copy
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import nn

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils import comm

from ..checkpoint import MaskScoringCheckpointer
from ..config import add_mask_calibrator
from ..engine import build_recipe, check_data, check_recipe
from ..engine.configs import value_of
from ..engine.evaluate import build_model, run_inference, use_names
from ..engine.preflight import dicts_of_dataset
from ..evaluation import MaskScoringCOCOEvaluator
from ..evaluation.average_precision import AveragePrecision
from ..evaluation.mask_quality import limit_of
from ..evaluation.matching import right_detections
from ..modeling import Detections, MaskCalibrator, mask_cues
from ..utils.errors import UserError, agree_on_user_errors
from .fit import Samples

__all__ = ["MAX_IMAGES", "CollectedDetections", "collect_detections"]

MAX_IMAGES = 1000  # by default; also in msrcnn_d2_cli, where importing this would take seconds


@dataclass
class CollectedDetections:
    """
    What a model finds in the images of a dataset.

    Attributes:
        cfg: the config of the model, with a calibrator.
        model: the model with its weights, in evaluation mode; its calibrator is not fitted.
        class_names: names of the model's classes, if its weights have them.
        dataset: name of the dataset.
        image_ids: ids of the images that were used.
        ranking: can rank the N detections; its results have no calibrated scores yet.
        samples: the N detections.
    """

    cfg: DictConfig | CfgNode
    model: nn.Module
    class_names: list[str] | None
    dataset: str
    image_ids: list
    ranking: AveragePrecision
    samples: Samples


def collect_detections(
    cfg: DictConfig | CfgNode,
    dataset: str | None = None,
    *,
    max_images: int = MAX_IMAGES,
    seed: int = 0,
) -> CollectedDetections | None:
    """
    Predict on images of a dataset, and match the detections with the annotations.

    Args, raises:
        see :func:`calibrate`.

    Returns:
        the detections of all processes on the main one, and None on others.
    """
    try:
        cfg = add_mask_calibrator(cfg)
    except ValueError as error:
        raise UserError(f"This model cannot be calibrated: {error}") from error
    if dataset is None:
        names = value_of(cfg, "dataloader.train.dataset.names") or ()
        dataset = names if isinstance(names, str) else next(iter(names), None)
    if dataset is None:
        raise UserError("Which images? Name a dataset, because the config has none to train on.")
    kind = MetadataCatalog.get(dataset).get("evaluator_type", "coco")
    if not kind.startswith("coco"):
        raise UserError(
            f"Dataset '{dataset}' has the evaluator_type '{kind}', but a calibrator learns from "
            "images with complete annotations in COCO's format: name such a dataset."
        )
    recipe = build_recipe(_tested_on(cfg, dataset))
    with agree_on_user_errors():
        check_recipe(recipe, comm.get_world_size(), training=False)
        images = dicts_of_dataset(dataset)
        is_sample = len(images) > max_images
        if is_sample:
            images = random.Random(seed).sample(images, max_images)
        image_ids = [x["image_id"] for x in images]
        check_data(recipe, training=False, image_ids=image_ids if is_sample else None)

    model = build_model(recipe).eval()
    roi_heads: Any = model.roi_heads
    calibrator: MaskCalibrator = roi_heads.mask_calibrator
    roi_heads.mask_calibrator = None  # the weights have none, or an older one
    checkpointer = MaskScoringCheckpointer(model)
    with agree_on_user_errors():
        if not recipe.init_checkpoint:
            raise UserError(
                "There are no weights to calibrate: give train.init_checkpoint=FILE (yaml: "
                "MODEL.WEIGHTS FILE)."
            )
        checkpointer.load(recipe.init_checkpoint, strict=True)
    class_names = checkpointer.loaded_class_names
    with agree_on_user_errors():
        collector = DetectionCollector(dataset)
        if not collector.coco_gt.dataset.get("annotations"):
            raise UserError(
                f"Dataset '{dataset}' has no annotations, so that nobody knows which masks are "
                "right: give annotated images."
            )
        use_names(collector, recipe.test_sets[0], class_names, recipe)
    roi_heads.mask_calibrator = CueRecorder()
    with _registered(images, dataset) as name:
        (test_set,) = build_recipe(_tested_on(cfg, name)).test_sets
        run_inference(recipe, model, test_set, collector)
    roi_heads.mask_calibrator = calibrator
    if not comm.is_main_process():
        return None
    if not collector.results:
        raise UserError(
            f"The model finds nothing in the images of '{dataset}': give the weights of a trained "
            "model."
        )
    ranking = AveragePrecision(
        collector.coco_gt,
        collector.results,
        max_dets=[limit_of(collector.results)],
        img_ids=image_ids,
    )
    samples = _samples(ranking, collector.mask_cues)
    return CollectedDetections(cfg, model, class_names, dataset, image_ids, ranking, samples)


class CueRecorder(nn.Module):
    """In the place of a calibrator, it only adds the cues to the instances."""

    def forward(self, instances: list[Instances]) -> list[Instances]:
        """
        Args:
            instances: as in :class:`MaskCalibrator`.

        Returns:
            the same instances with "mask_cues" (N, 1 + C): the log-odds of the score, and the cues.
        """
        detections = Detections.of(instances)
        columns = detections.score_log_odds[:, None], mask_cues(detections)
        values = torch.cat(columns, dim=1).split([len(x) for x in instances])
        for x, values_per_image in zip(instances, values):
            x.mask_cues = values_per_image
        return instances


class DetectionCollector(MaskScoringCOCOEvaluator):
    """
    An evaluator that only collects the detections of all processes.

    Attributes, those after the first set by `evaluate` on the main process:
        coco_gt: the ground truth.
        results: N detections in COCO's result format.
        mask_cues: (N, 1 + C), what :class:`CueRecorder` has computed for them.
    """

    takes_unpasted_masks = True  # its `process` leaves them to that of the base class

    def __init__(self, dataset_name: str, class_names: Sequence[str] | None = None):
        super().__init__(dataset_name, mask_quality=False, class_names=class_names)
        self.coco_gt = self._coco_api
        self.results: list[dict] = []
        self.mask_cues = np.zeros((0, 0), dtype=np.float32)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for image, output in zip(inputs, outputs):
            super().process([image], [output])
            instances = output["instances"].to("cpu")
            cues = instances.mask_cues
            if self._class_in_dataset is not None:  # others are left out
                cues = cues[self._class_in_dataset[instances.pred_classes] >= 0]
            self._predictions[-1]["mask_cues"] = cues.numpy()

    def _eval_predictions(
        self, predictions: list[dict], img_ids: Collection[Any] | None = None
    ) -> None:
        self.results = self._with_dataset_categories(predictions)
        self.mask_cues = np.concatenate([x["mask_cues"] for x in predictions])


def _samples(ranking: AveragePrecision, mask_cues: np.ndarray) -> Samples:
    overlaps = ranking.overlaps
    right, counted = right_detections(overlaps, overlaps.largest, ranking.max_dets[-1])
    index: dict = {}
    images = [index.setdefault(r["image_id"], len(index)) for r in overlaps.results]
    return Samples(
        cues=torch.from_numpy(mask_cues[:, 1:]),
        score_log_odds=torch.from_numpy(mask_cues[:, 0]),
        right=torch.from_numpy(right.T),
        counted=torch.from_numpy(counted.all(axis=0)),
        images=torch.tensor(images),
    )


def _tested_on(cfg: DictConfig | CfgNode, dataset: str) -> DictConfig | CfgNode:
    """A copy of the config that evaluates on one dataset only."""
    if isinstance(cfg, CfgNode):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = (dataset,)
        return cfg
    cfg = copy.deepcopy(cfg)
    test = cfg.dataloader.get("test")
    if test is None:
        raise UserError("The config has no dataloader.test, which says how images are read.")
    if isinstance(test, ListConfig):
        test = test[0]
    test.dataset.names = dataset
    cfg.dataloader.test = test
    cfg.dataloader.evaluator = L(MaskScoringCOCOEvaluator)(dataset_name=dataset)
    return cfg


@contextmanager
def _registered(images: list[dict], dataset: str) -> Iterator[str]:
    """
    Register images of a dataset as one of their own, because configs refer to datasets by name.

    Returns:
        the name, which is known until the end of the block.
    """
    name = f"images of {dataset}"
    DatasetCatalog.register(name, lambda: images)
    try:
        metadata = {k: v for k, v in MetadataCatalog.get(dataset).as_dict().items() if k != "name"}
        MetadataCatalog.get(name).set(**metadata)
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
