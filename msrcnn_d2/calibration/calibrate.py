"""Calibrate a trained model: from a config and a dataset to a checkpoint with a calibrator."""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from detectron2.config import CfgNode, LazyConfig

from msrcnn_d2_runtime.iou_thresholds import IOU_THRESHOLDS
from msrcnn_d2_runtime.scores import scores_of
from msrcnn_d2_runtime.text import plural

from ..checkpoint.writing import write_weights
from ..evaluation import MaskQuality
from ..evaluation.average_precision import AveragePrecision
from ..evaluation.matching import right_detections
from ..evaluation.operating_points import accept_thresholds
from ..modeling import MaskCalibrator, expected_ious
from ..utils.errors import UserError
from .collect import MAX_IMAGES, CollectedDetections, collect_detections
from .fit import NUM_FOLDS, Samples, cross_validated_probs, fit_calibrator

__all__ = [
    "Calibration",
    "CheckedFit",
    "add_scores",
    "calibrate",
    "calibrate_on",
    "fit_if_better",
]

logger = logging.getLogger(__name__)

# Cross-validation over fewer cannot tell: with ten images it trusted the networks of four of twelve
# models, and two of these lost 0.3 and 2.4 mask AP on val; with twenty, none lost (projects/seeds)
MIN_IMAGES = 20


@dataclass
class Calibration:
    """
    A calibrated model, and what it is worth.

    Attributes:
        cfg: the config of the model with the calibrator.
        model: the model with the calibrator, in evaluation mode.
        class_names: names of the model's classes, if its weights have them.
        quality: of the masks under all rankings, over the images that the calibrator was fitted to,
            with the probabilities of :class:`CheckedFit`.
        dataset: name of the dataset.
        num_images, num_detections: what the calibrator was fitted to.
        with_network: whether the calibrator ranks the masks anew. Otherwise there was too little
            data to gain: probabilities are calibrated, and the ranking is that of the mask score.
        ap_of_network: mask AP in percent that the cross-validation promised with the networks; NaN
            if there were too few images to tell.
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
        them, from whichever folder it is read.

        Returns:
            the path of the config.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = folder / "model.pth", folder / "config.yaml"
        write_weights(self.model.state_dict(), str(weights), class_names=self.class_names)
        paths = str(weights.absolute()), str(folder.absolute())
        cfg = copy.deepcopy(self.cfg)
        if isinstance(cfg, CfgNode):
            cfg.defrost()
            cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = paths
            config.write_text(cfg.dump())
        else:
            cfg.train.init_checkpoint, cfg.train.output_dir = paths
            LazyConfig.save(cfg, str(config))
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
    collected = collect_detections(cfg, dataset, max_images=max_images, seed=seed)
    return None if collected is None else calibrate_on(collected, seed=seed, progress=progress)


def calibrate_on(
    collected: CollectedDetections, *, seed: int = 0, progress: bool = True
) -> Calibration:
    """Like :func:`calibrate`, with detections that are there already."""
    ranking, samples = collected.ranking, collected.samples
    num_images = len(collected.image_ids)
    roi_heads: Any = collected.model.roi_heads
    calibrator = copy.deepcopy(roi_heads.mask_calibrator).to("cpu")
    with_detections = len(samples.images[samples.counted].unique())
    num_right = int((samples.right[:, 0] & samples.counted).sum())
    if with_detections < NUM_FOLDS or not num_right:
        raise UserError(
            "There is too little to fit to: the model finds something in "
            f"{plural(with_detections, 'image')} of '{collected.dataset}', and {num_right} of its "
            f"masks are right. Give at least {NUM_FOLDS} images with objects that it finds, better "
            "100."
        )
    logger.info(
        "Fitting to %s in %s ...",
        *(plural(len(samples), "detection"), plural(num_images, "image")),
    )
    title = "fitting" if progress else ""
    fit = fit_if_better(calibrator, ranking, samples, seed=seed, progress=title)
    add_scores(ranking.overlaps.results, fit.probs)
    roi_heads.mask_calibrator = calibrator.to(next(roi_heads.parameters()).device)
    return Calibration(
        cfg=collected.cfg,
        model=collected.model,
        class_names=collected.class_names,
        quality=MaskQuality(ranking),
        dataset=collected.dataset,
        num_images=num_images,
        num_detections=len(samples),
        with_network=fit.with_network,
        ap_of_network=fit.ap_of_network,
    )


def add_scores(results: Iterable[dict], probs: torch.Tensor) -> None:
    """
    Add to results in COCO's format what a model with a calibrator predicts.

    Args:
        results: N detections, which are modified.
        probs: (N, 10), their "mask_iou_probs".
    """
    values = probs, probs.mean(dim=1), expected_ious(probs)
    keys = "mask_iou_probs", "quality_score", "expected_iou"
    for result, *row in zip(results, *(x.tolist() for x in values)):
        result.update(zip(keys, row))


@dataclass
class CheckedFit:
    """
    Attributes:
        probs: Tensor of shape (N, 10), for each detection from a calibrator that has not seen its
            image; without networks, from the calibrator itself, which ranks as the model does.
        with_network: whether the networks were fitted, because they rank the masks better.
        ap_of_network: mask AP in percent that the cross-validation promised with the networks; NaN
            if there were too few images to tell.
    """

    probs: torch.Tensor
    with_network: bool
    ap_of_network: float


def fit_if_better(
    calibrator: MaskCalibrator,
    ranking: AveragePrecision,
    samples: Samples,
    *,
    seed: int = 0,
    progress: str = "",
) -> CheckedFit:
    """
    Fit a calibrator in place: with the networks if calibrators that have not seen an image rank its
    masks better than the model does, and without them otherwise. Then fit its thresholds.

    Args:
        calibrator: on the CPU.
        ranking, samples: the same N detections.
        seed, progress: as in :func:`fit_calibrator`.
    """
    with_network, ap_of_network = False, float("nan")
    if len(samples.images[samples.counted].unique()) >= MIN_IMAGES:
        probs = cross_validated_probs(calibrator, samples, seed=seed, progress=bool(progress))
        scores = scores_of(ranking.overlaps.results)
        ap_of_network, ap_of_score = (
            100 * ranking.evaluate(values).numbers["AP"]
            for values in (
                probs.mean(dim=1).tolist(),
                scores.get("mask_score", scores["class_score"]),
            )
        )
        with_network = ap_of_network > ap_of_score
    fit_calibrator(calibrator, samples, with_network=with_network, seed=seed, progress=progress)
    if not with_network:
        # Five lines would not rank as one does; and one hardly knows the images it was fitted to
        probs = calibrator.probs(samples.cues, samples.score_log_odds)
    # What is right at an IoU depends on who chooses first, so each column has its own matching
    matchings = [
        right_detections(ranking.overlaps, column, ranking.max_dets[-1], [threshold])
        for column, threshold in zip(probs.T.numpy(), IOU_THRESHOLDS)
    ]
    right, counted = (np.concatenate(rows).T for rows in zip(*matchings))
    thresholds = accept_thresholds(probs.numpy(), right, counted)
    calibrator.accept_thresholds.copy_(torch.from_numpy(thresholds))
    return CheckedFit(probs, with_network, ap_of_network)
