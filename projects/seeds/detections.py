"""What a trained model finds in images. It is kept on disk, since studies use it many times."""

import contextlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO

from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from msrcnn_d2.calibration import Samples, collect_detections
from msrcnn_d2.evaluation.average_precision import AveragePrecision
from msrcnn_d2.evaluation.mask_quality import limit_of

__all__ = ["Found", "find"]


@dataclass
class Found:
    """
    The N detections of a model in some images.

    Attributes:
        ranking: can rank them.
        samples: what a calibrator can be fitted to.
        image_ids: of the images.
    """

    ranking: AveragePrecision
    samples: Samples
    image_ids: list

    @property
    def results(self) -> list[dict[str, Any]]:
        """N detections in COCO's result format."""
        return list(self.ranking.overlaps.results)

    def in_images(self, image_ids: Collection) -> "Found":
        """Only what was found in these images."""
        chosen = set(image_ids)
        inside = torch.tensor([r["image_id"] in chosen for r in self.results])
        results = [dict(r) for r in self.results if r["image_id"] in chosen]
        ids = [k for k in self.image_ids if k in chosen]
        ranking = _ranking(self.ranking.overlaps.coco_gt, results, ids)
        return Found(ranking, self.samples[inside], ids)


def find(
    config: Path,
    weights: Path,
    annotations: Path,
    images: Path,
    file: Path,
    max_images: int = 2000,
    seed: int = 0,
) -> Found:
    """
    Args:
        config, weights: of the model.
        annotations, images: the dataset, in COCO's format.
        file: holds the detections if they have been found before, and is written otherwise.
        max_images: how many images to use at most; a random sample if there are more.
        seed: of the sample.
    """
    if not file.is_file():
        name = str(file)  # there is one for each model
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, str(annotations), str(images))
        cfg = LazyConfig.load(str(config))
        cfg.train.init_checkpoint = str(weights)
        collected = collect_detections(cfg, name, max_images=max_images, seed=seed)
        assert collected is not None  # there are no other processes
        content = {
            "results": list(collected.ranking.overlaps.results),
            "samples": vars(collected.samples),
            "image_ids": collected.image_ids,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        torch.save(content, unfinished)
        unfinished.rename(file)
    content = torch.load(file, weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = COCO(annotations)
    ranking = _ranking(coco_gt, content["results"], content["image_ids"])
    return Found(ranking, Samples(**content["samples"]), content["image_ids"])


def _ranking(coco_gt: COCO, results: list[dict], image_ids: list) -> AveragePrecision:
    return AveragePrecision(coco_gt, results, max_dets=[limit_of(results)], img_ids=image_ids)
