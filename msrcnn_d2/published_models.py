"""Models that others have trained and published: their results, and URLs of their weights."""

from pathlib import Path
from typing import NamedTuple

__all__ = ["PUBLISHED", "SOURCE", "Published", "published_results", "published_table"]


class Published(NamedTuple):
    """
    A published model.

    Attributes:
        box_ap, mask_ap: AP on COCO val2017 in percent; masks are ranked by mask score.
        checkpoint: path of the weights below `SOURCE_URL`.
        memory: GPU memory in GB for training with 2 images per iteration.
        speed: images per second in inference on a V100.
    """

    box_ap: float
    mask_ap: float
    checkpoint: str
    memory: float | None = None
    speed: float | None = None

    @property
    def checkpoint_url(self) -> str:
        return f"{SOURCE_URL}/{self.checkpoint}"


# MMDetection's Mask Scoring R-CNN models, by the name of our config
SOURCE = "MMDetection 2.0"
SOURCE_URL = "https://download.openmmlab.com/mmdetection/v2.0/ms_rcnn"
# fmt: off
PUBLISHED = {
    "ms_rcnn_R_50_FPN_1x": Published(
        38.2, 36.0,
        "ms_rcnn_r50_caffe_fpn_1x_coco/"
        "ms_rcnn_r50_caffe_fpn_1x_coco_20200702_180848-61c9355e.pth",
        memory=4.5,
    ),
    "ms_rcnn_R_50_FPN_2x": Published(
        38.8, 36.3,
        "ms_rcnn_r50_caffe_fpn_2x_coco/"
        "ms_rcnn_r50_caffe_fpn_2x_coco_bbox_mAP-0.388__segm_mAP-0.363_20200506_004738-ee87b137.pth",
    ),
    "ms_rcnn_R_101_FPN_1x": Published(
        40.4, 37.6,
        "ms_rcnn_r101_caffe_fpn_1x_coco/"
        "ms_rcnn_r101_caffe_fpn_1x_coco_bbox_mAP-0.404__segm_mAP-0.376_20200506_004755-b9b12a37.pth",
        memory=6.5,
    ),
    "ms_rcnn_R_101_FPN_2x": Published(
        41.1, 38.1,
        "ms_rcnn_r101_caffe_fpn_2x_coco/"
        "ms_rcnn_r101_caffe_fpn_2x_coco_bbox_mAP-0.411__segm_mAP-0.381_20200506_011134-5f3cc74f.pth",
    ),
    # The file is called 1x there, but was trained for 2x
    "ms_rcnn_X_101_32x4d_FPN_2x": Published(
        41.8, 38.7,
        "ms_rcnn_x101_32x4d_fpn_1x_coco/ms_rcnn_x101_32x4d_fpn_1x_coco_20200206-81fd1740.pth",
        memory=7.9, speed=11.0,
    ),
    "ms_rcnn_X_101_64x4d_FPN_1x": Published(
        43.0, 39.5,
        "ms_rcnn_x101_64x4d_fpn_1x_coco/ms_rcnn_x101_64x4d_fpn_1x_coco_20200206-86ba88d2.pth",
        memory=11.0, speed=8.0,
    ),
    "ms_rcnn_X_101_64x4d_FPN_2x": Published(
        42.6, 39.5,
        "ms_rcnn_x101_64x4d_fpn_2x_coco/ms_rcnn_x101_64x4d_fpn_2x_coco_20200308-02a445e2.pth",
        memory=11.0, speed=8.0,
    ),
}
# fmt: on


def published_table() -> str:
    """The published results as a table in Markdown, which is in README.md."""
    rows: list[tuple] = [
        ("config (`.py` or `.yaml`)", "box AP", "mask AP", "memory (GB)", "images / s", "weights"),
        ("---",) * 6,
    ]
    for name, x in PUBLISHED.items():
        weights = f"[{SOURCE}]({x.checkpoint_url})"
        rows.append((f"`{name}`", x.box_ap, x.mask_ap, x.memory or "", x.speed or "", weights))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def published_results(config_file: str) -> Published | None:
    """What was published for a config, which is identified by its file name, or None."""
    return PUBLISHED.get(Path(config_file).stem)
