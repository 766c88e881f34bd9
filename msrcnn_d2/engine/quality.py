"""What is done with the quality of masks that an evaluation has measured."""

import logging
import os

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from detectron2.data import MetadataCatalog
from detectron2.utils.events import get_event_storage

from ..evaluation import MaskQuality
from ..report import write_report
from ..report.figures import reliability_figure
from .recipe import Recipe, TestSet

__all__ = ["log_reliability", "write_report_of"]

logger = logging.getLogger(__name__)


def log_reliability(quality: MaskQuality, test_set: TestSet, recipe: Recipe) -> None:
    """
    Show the reliability diagram in TensorBoard, while training. The numbers are there already, as
    all results of an evaluation are.
    """
    diagrams = quality.reliability()
    if not diagrams:  # the model predicts no IoU
        return
    canvas = FigureCanvasAgg(reliability_figure(diagrams))
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    name = "mask_quality/reliability"
    if len(recipe.test_sets) > 1:
        name = f"{test_set}/{name}"
    get_event_storage().put_image(name, pixels.transpose(2, 0, 1))


def write_report_of(quality: MaskQuality, test_set: TestSet, recipe: Recipe) -> None:
    """Write the report into the folder "report" of the output folder, one for each test set."""
    folder = os.path.join(recipe.output_dir, "report")
    if len(recipe.test_sets) > 1:
        folder = os.path.join(folder, str(test_set))
    roots = [MetadataCatalog.get(name).get("image_root") for name in test_set.names]
    title, root = f"Masks on {test_set}", roots[0] if roots else None
    page = write_report(quality, folder, title, root, recipe.images)
    logger.info("Report on the quality of masks: %s", page)
