"""Fenced blocks of Markdown pages, and a folder in which the commands of the pages work."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image

from detectron2.config import LazyConfig, instantiate

from msrcnn_d2 import add_mask_calibrator
from tests.helpers.toy import (
    IMAGE_SIZE,
    OBJECTS,
    tiny_mask_rcnn,
    tiny_yacs_config,
    write_coco_json,
    write_images,
)
from tests.helpers.toy_training import lazy_config
from tests.helpers.weights import MMDETECTION, renamed

# A mark is a comment before the block, which no reader sees
NEEDS = re.compile(
    r"needs (COCO|LVIS|Cityscapes|a download|GPUs|a GPU|SLURM|a trained model|a video|Gradio"
    r"|an export|keypoints)"
    r"( and (COCO|a download|GPUs|a GPU))?"
)
CONTINUES = "continues"
# A library of the extra "integrations", without which the block is not run
CLIENT = re.compile(r"client: (\w+)")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """
    Attributes:
        language: such as "bash"; "{...}" for a directive of MyST, empty without one.
        mark: what it needs, or that it continues the block before; empty without one.
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")),
            found["language"],
            found["mark"] or "",
            found["text"],
        )
        for found in FENCE.finditer(text)
    ]


def commands_of(script: str) -> Iterator[list[str]]:
    """The words of each command; `$NAME` is replaced where the script sets NAME."""
    variables: dict[str, str] = {}
    pending = ""
    for line in script.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        pending = ""
        if words[:1] == ["export"]:
            del words[0]
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, variables[name] = words.pop(0).split("=", 1)
        words = [x for w in words for x in _expanded(w, variables)]
        if words:
            yield words
    assert not pending, f"an open quotation: {pending}"


def _expanded(word: str, variables: dict[str, str]) -> list[str]:
    if word.startswith("$") and word[1:] in variables:
        return shlex.split(variables[word[1:]])
    return [word]


# A config of the user's, which trains for two iterations
TINY_CONFIG = """
from tests.helpers.pages import {function}

_cfg = {function}()
model, dataloader, train = _cfg.model, _cfg.dataloader, _cfg.train
optimizer, lr_multiplier = _cfg.optimizer, _cfg.lr_multiplier
"""


def tiny_training() -> DictConfig:
    cfg = lazy_config("my_train")
    cfg.dataloader.test.dataset.names = "my_val"
    cfg.dataloader.evaluator.dataset_name = "${..test.dataset.names}"
    cfg.train.max_iter = 2
    return cfg


def tiny_training_of_mask_rcnn() -> DictConfig:
    cfg = tiny_training()
    cfg.model = tiny_mask_rcnn().model
    return cfg


def write_tiny_world(folder: Path) -> None:
    """A data set, configs and weights of tiny models, under the names that the pages use."""
    (folder / "images").mkdir()
    write_images(folder / "images", OBJECTS)
    for name in ("train", "val"):
        write_coco_json(folder / f"{name}.json", OBJECTS)
    Image.open(folder / "images" / "1.png").save(folder / "image.jpg")
    _write_labelme(folder / "pictures")

    zoo = folder / "COCO-InstanceSegmentation"  # found before the configs of the same names
    zoo.mkdir()
    ours = TINY_CONFIG.format(function="tiny_training")
    for path in (folder / "my_config.py", zoo / "ms_rcnn_R_50_FPN_1x.py"):
        path.write_text(ours)
    plain = TINY_CONFIG.format(function="tiny_training_of_mask_rcnn")
    (folder / "my_mask_rcnn.py").write_text(plain)
    (zoo / "ms_rcnn_R_50_FPN_1x.yaml").write_text(_yacs_training().dump())

    weights = instantiate(tiny_training().model).state_dict()
    torch.save({"model": weights}, folder / "published.pth")
    torch.save({"state_dict": renamed(weights, MMDETECTION)}, folder / "mmdetection.pth")
    weights = {k: v for k, v in weights.items() if "mask_iou_head" not in k}
    torch.save({"model": weights}, folder / "mask_rcnn.pth")

    (folder / "calibrated").mkdir()
    calibrated = add_mask_calibrator(tiny_training())
    model = instantiate(calibrated.model)
    model.roi_heads.mask_calibrator.accept_thresholds.fill_(0.5)
    calibrated.train.init_checkpoint = str(folder / "calibrated" / "model.pth")
    torch.save({"model": model.state_dict()}, calibrated.train.init_checkpoint)
    LazyConfig.save(calibrated, str(folder / "calibrated" / "config.yaml"))


def _write_labelme(folder: Path) -> None:
    """The two images, with an object of a fourth class, and the JSON files of LabelMe."""
    folder.mkdir()
    write_images(folder, OBJECTS)
    height, width = IMAGE_SIZE
    first, second = OBJECTS
    for k, objects in enumerate([first, [*second, (3, [2, 2, 8, 2, 8, 8])]], start=1):
        shapes = [
            {
                "label": ("heart", "moon", "ring", "star")[class_],
                "points": [polygon[j : j + 2] for j in range(0, len(polygon), 2)],
                "group_id": None,
                "shape_type": "polygon",
            }
            for class_, polygon in objects
        ]
        contents = {"imagePath": f"{k}.png", "imageHeight": height, "imageWidth": width}
        (folder / f"{k}.json").write_text(json.dumps({**contents, "shapes": shapes}))


def _yacs_training():
    cfg = tiny_yacs_config()
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.STEPS = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg
