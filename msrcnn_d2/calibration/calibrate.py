"""Calibrate a trained model: from a config and a dataset to a checkpoint with a calibrator."""

import copy
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import nn

from detectron2.config import CfgNode, LazyConfig
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..checkpoint import MaskScoringCheckpointer
from ..checkpoint.writing import write_weights
from ..config import add_mask_calibrator
from ..engine import build_recipe, check_data, check_recipe
from ..engine.configs import value_of
from ..engine.evaluate import build_model, run_inference, use_names
from ..evaluation import MaskQuality, MaskScoringCOCOEvaluator
from ..evaluation.average_precision import AveragePrecision
from ..evaluation.mask_quality import limit_of
from ..evaluation.operating_points import accept_thresholds, right_detections
from ..utils.errors import UserError, agree_on_user_errors
from ..utils.text import plural
from .collect import CueRecorder, DetectionCollector
from .fit import NUM_FOLDS, Samples, cross_validated_probs, fit_calibrator

__all__ = ["Calibration", "calibrate"]

logger = logging.getLogger(__name__)

MAX_IMAGES = 1000


@dataclass
class Calibration:
    """
    A calibrated model, and what it is worth.

    Attributes:
        cfg: the config of the model with the calibrator.
        model: the model with the calibrator, in evaluation mode.
        class_names: names of the model's classes, if its weights have them.
        quality: of the masks under all rankings, over the images that the calibrator was fitted to.
            Each detection has the calibrated score of a calibrator that has not seen its image.
        dataset: name of the dataset.
        num_images, num_detections: what the calibrator was fitted to.
        with_network: whether the calibrator ranks the masks anew. Otherwise there was too little
            data to gain: probabilities are calibrated, and the ranking is that of the mask score.
        ap_of_network: mask AP in percent that the cross-validation promised with the networks.
    """

    cfg: DictConfig | CfgNode
    model: nn.Module
    class_names: list[str] | None
    quality: MaskQuality
    dataset: str
    num_images: int
    num_detections: int
    with_network: bool
    ap_of_network: float

    def write(self, folder: str | Path) -> Path:
        """
        Write "model.pth", the weights with the calibrator, and "config.yaml", a config that uses
        them.

        Returns:
            the path of the config.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = folder / "model.pth", folder / "config.yaml"
        write_weights(self.model.state_dict(), str(weights), class_names=self.class_names)
        if isinstance(self.cfg, CfgNode):
            self.cfg.MODEL.WEIGHTS, self.cfg.OUTPUT_DIR = str(weights), str(folder)
            config.write_text(self.cfg.dump())
        else:
            self.cfg.train.update(init_checkpoint=str(weights), output_dir=str(folder))
            LazyConfig.save(self.cfg, str(config))
        return config


def calibrate(
    cfg: DictConfig | CfgNode,
    dataset: str | None = None,
    *,
    max_images: int = MAX_IMAGES,
    seed: int = 0,
    progress: bool = True,
) -> Calibration | None:
    """
    Fit a calibrator to the detections of a trained Mask R-CNN or Mask Scoring R-CNN.

    It predicts on images of the dataset, matches the detections with the annotations, and fits
    :class:`MaskCalibrator` to them. The model itself does not change. All processes of a job have
    to call this together; they share the images.

    Args:
        cfg: of the model, of either kind. Its `train.init_checkpoint` or `MODEL.WEIGHTS` are the
            trained weights. It is not modified.
        dataset: name of a registered dataset in COCO's format; by default the first one that the
            config trains on. Images that the model was trained on are as good as others, so give
            the dataset with the most annotations; but not the one that results are reported on.
        max_images: how many images to use at most; a random sample if there are more.
        seed: of the sample and the fit. The same arguments give the same calibrator.
        progress: whether to show bars.

    Returns:
        the calibrated model; None in other processes than the main one.

    Raises:
        UserError: the config, the weights or the dataset cannot be used, or there are too few
            images with detections.
    """
    try:
        cfg = add_mask_calibrator(cfg)
    except ValueError as error:
        raise UserError(f"This model cannot be calibrated: {error}") from error
    if dataset is None:
        names = value_of(cfg, "dataloader.train.dataset.names") or ()
        dataset = names if isinstance(names, str) else next(iter(names), None)
    if dataset is None:
        raise UserError(
            "Which images? Give the name of a dataset: the config has none to train on."
        )
    recipe = build_recipe(_tested_on(cfg, dataset))
    with agree_on_user_errors():
        check_recipe(recipe, comm.get_world_size(), training=False)
        check_data(recipe, training=False)
    sample, image_ids = _sample(dataset, max_images, seed)
    (test_set,) = build_recipe(_tested_on(cfg, sample)).test_sets

    model = build_model(recipe).eval()
    roi_heads: Any = model.roi_heads
    calibrator = roi_heads.mask_calibrator.to("cpu")
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
    roi_heads.mask_calibrator = CueRecorder()
    with agree_on_user_errors():
        collector = DetectionCollector(sample)
        use_names(collector, test_set, class_names, recipe)
    run_inference(recipe, model, test_set, collector)
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
    num_images = len(image_ids)
    with_detections = len(samples.images.unique())
    num_right = int((samples.right[:, 0] & samples.counted).sum())
    if with_detections < NUM_FOLDS or not num_right:
        raise UserError(
            f"There is too little to fit to: the model finds something in "
            f"{plural(with_detections, 'image')} of '{dataset}', and {num_right} of its masks are "
            f"right. Give at least {NUM_FOLDS} images with objects that it finds, better 100."
        )
    logger.info(
        "Fitting to %s in %s ...",
        *(plural(len(samples), "detection"), plural(num_images, "image")),
    )
    # Calibrators that have not seen an image say whether the networks rank its masks better
    by_network = cross_validated_probs(calibrator, samples, seed=seed, progress=progress)
    by_line = cross_validated_probs(calibrator, samples, with_network=False, seed=seed)
    ap_of_network, ap_of_line = (
        100 * ranking.evaluate(probs.mean(dim=1).tolist()).numbers["AP"]
        for probs in (by_network, by_line)
    )
    with_network = ap_of_network > ap_of_line
    probs = by_network if with_network else by_line
    quality_scores = probs.mean(dim=1).tolist()
    for result, row, score in zip(collector.results, probs.tolist(), quality_scores):
        result.update(mask_iou_probs=row, quality_score=score)

    fit_calibrator(
        calibrator,
        samples,
        with_network=with_network,
        seed=seed,
        progress="fitting" if progress else "",
    )
    # What is right at an IoU depends on who chooses first, so each column has its own matching
    matchings = [
        right_detections(ranking.overlaps, column, ranking.max_dets[-1])
        for column in probs.T.numpy()
    ]
    right, counted = (
        np.stack([matching[part][k] for k, matching in enumerate(matchings)], axis=1)
        for part in (0, 1)
    )
    thresholds = accept_thresholds(probs.numpy(), right, counted)
    calibrator.accept_thresholds.copy_(torch.from_numpy(thresholds))
    roi_heads.mask_calibrator = calibrator.to(recipe.device)
    return Calibration(
        cfg=cfg,
        model=model,
        class_names=class_names,
        quality=MaskQuality(ranking),
        dataset=dataset,
        num_images=num_images,
        num_detections=len(samples),
        with_network=with_network,
        ap_of_network=ap_of_network,
    )


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


def _sample(dataset: str, max_images: int, seed: int) -> tuple[str, list]:
    """
    The name of a dataset with a random sample of the images, or of the dataset itself if it has no
    more than `max_images`; and the ids of its images.
    """
    images = DatasetCatalog.get(dataset)
    if len(images) <= max_images:
        return dataset, [x["image_id"] for x in images]
    images = random.Random(seed).sample(images, max_images)
    name = f"{dataset} ({max_images} images)"
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: images)
    metadata = {k: v for k, v in MetadataCatalog.get(dataset).as_dict().items() if k != "name"}
    MetadataCatalog.get(name).set(**metadata)
    return name, [x["image_id"] for x in images]
