"""A training of a tiny model on nine small images, by `msrcnn-d2 train`."""

import os
from pathlib import Path

import detectron2.data.transforms as T
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2_cli import main
from tests.helpers.toy import OBJECTS, tiny_mask_scoring_rcnn, write_coco_json, write_images

NUM_IMAGES = 9


def write_dataset(folder: Path, name: str = "toy") -> list[str]:
    """The images and their annotations; returns the options that register them."""
    objects = (OBJECTS * NUM_IMAGES)[:NUM_IMAGES]
    write_images(folder, objects)
    annotations = write_coco_json(Path(folder) / "annotations.json", objects)
    return ["--dataset", name, annotations, str(folder)]


def write_lazy_config(path: Path) -> str:
    """A file with :func:`lazy_config`."""
    LazyConfig.save(lazy_config(), str(path))
    return str(path)


def lazy_config(dataset: str = "toy"):
    """Six iterations, with a checkpoint after each third."""
    cfg = detectron2_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    cfg.model = tiny_mask_scoring_rcnn().model
    cfg.dataloader.train.dataset.names = cfg.dataloader.test.dataset.names = dataset
    cfg.dataloader.evaluator = L(MaskScoringCOCOEvaluator)(dataset_name=dataset)
    cfg.dataloader.train.total_batch_size = 2
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    resize = L(T.ResizeShortestEdge)(short_edge_length=(48, 64), sample_style="choice")
    cfg.dataloader.train.mapper.augmentations[0] = resize
    cfg.dataloader.test.mapper.augmentations = []
    cfg.train.update(init_checkpoint="", max_iter=6, device="cpu", seed=1, log_period=1)
    cfg.train.checkpointer.period = 3
    cfg.optimizer.lr = 1e-3
    return cfg


def run(*args) -> None:
    """Run `msrcnn-d2 train` in this process; a mistake raises SystemExit."""
    assert main(["train", *map(str, args)]) == 0


def with_python_path(*folders) -> str:
    """A PYTHONPATH with these besides: the one there is may name another Detectron2."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
