"""From images to masks and their scores."""

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image, UnidentifiedImageError
from torch import nn

import detectron2.data.transforms as T
from detectron2.config import CfgNode, instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model

from ..checkpoint import MaskScoringCheckpointer
from ..class_names import same
from ..evaluation.operating_points import parse_operating_point
from ..evaluation.scores import MASK_IOU_PROBS, SCORES
from ..image_reading import ImageSettings, image_settings, open_image, scaled_to_8_bits, to_rgb
from ..modeling.acceleration import use_channels_last_on_cpu
from ..modeling.mask_calibrator import UNREACHED
from ..utils.errors import UserError
from ..utils.iou_thresholds import iou_index
from ..utils.text import listed

__all__ = ["MaskScoringPredictor", "read_bgr_image"]

logger = logging.getLogger(__name__)

ImageLike = np.ndarray | Image.Image | str | os.PathLike
# {rank_by: the field of instances that has it}
SCORE_FIELDS = {score.key: score.field for score in SCORES.values() if score.ranks}


class MaskScoringPredictor:
    """
    Detectron2's `DefaultPredictor` for both kinds of config, one image or a batch.

    Images are read and resized, and their channels ordered, as the config says for evaluation.

    Attributes:
        model: in evaluation mode, with the config's weights; on a CPU in channels-last order, which
            is faster for inference only.
        image_settings: how images are read, such as the scale of 16-bit images.
        metadata: for visualisers: that of the config's first test dataset, or only the names of
            the classes if the dataset has other names.

    Example:
        >>> cfg = model_zoo.get_config(
        ...     "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py", trained=True
        ... )
        >>> predict = MaskScoringPredictor(cfg, score_threshold=0.5)
        >>> instances = predict("image.jpg")["instances"]
    """

    def __init__(
        self,
        cfg: DictConfig | CfgNode,
        *,
        rank_by: str | None = None,
        score_threshold: float | str = 0.0,
        device: str | None = None,
        class_names: Sequence[str] | None = None,
    ):
        """
        Args:
            cfg: LazyConfig or yacs config, which is not modified. Its `train.init_checkpoint` or
                `MODEL.WEIGHTS` is anything that :meth:`MaskScoringCheckpointer.load` takes.
            rank_by: "quality_score" for the calibrated score, "mask_score", or "score" for the
                class score, the only one of a plain Mask R-CNN. By default the calibrated score if
                the model has a calibrator, and the mask score otherwise.
            score_threshold: instances with a lower score are left out. `rank_by` chooses the score.
                Or, for a model with a calibrator, the precision that the instances should have:
                "p95@75" leaves out those below the threshold above which 95 percent of the masks
                had an IoU of at least 0.75 when the model was calibrated. This threshold is on the
                probability of that IoU, whatever `rank_by` is. The config's own threshold on the
                class score also applies.
            device: such as "cpu" or "cuda"; by default the config's, or the CPU if there is no
                GPU.
            class_names: names of the classes. By default, those in the weights' file, or if it has
                none, those of the config's first test dataset.

        Raises:
            UserError: the weights do not fit the whole model, the model lacks the score or the
                calibrator that is asked for, its detections did not reach the precision, or the
                number of names is not the number of its classes.
        """
        if rank_by is not None and rank_by not in SCORE_FIELDS:
            raise ValueError(f"rank_by is one of {', '.join(SCORE_FIELDS)}, not '{rank_by}'.")
        if isinstance(score_threshold, str):
            parse_operating_point(score_threshold)  # before the model is built
        if not isinstance(cfg, (CfgNode, DictConfig)):
            raise TypeError(
                "cfg is a config, such as from model_zoo.get_config or LazyConfig.load, not a "
                f"{type(cfg).__name__}."
            )
        self.image_settings = image_settings(cfg)
        parts = _from_yacs(cfg, device) if isinstance(cfg, CfgNode) else _from_lazy(cfg, device)
        self.model = parts.model.eval()
        self.input_format = parts.input_format
        self.augmentations = parts.augmentations
        roi_heads = getattr(self.model, "roi_heads", None)
        calibrator: Any = getattr(roi_heads, "mask_calibrator", None)
        needs_calibrator = rank_by == "quality_score" or isinstance(score_threshold, str)
        if needs_calibrator and calibrator is None:
            raise UserError(
                "This model has no calibrated scores: calibrate it with `msrcnn-d2 calibrate`, or "
                'rank by "mask_score" or "score" with a number as score_threshold.'
            )
        self.rank_by = rank_by or ("mask_score" if calibrator is None else "quality_score")
        if self.rank_by == "mask_score" and getattr(roi_heads, "mask_iou_head", None) is None:
            raise UserError(
                "This model does not score its masks: rank them by class score with "
                'rank_by="score", or give it a mask IoU head (see add_mask_scoring).'
            )
        if not parts.weights:
            raise UserError(
                "The config has no weights to predict with: set train.init_checkpoint (yaml: "
                "MODEL.WEIGHTS) to a checkpoint."
            )
        checkpointer = MaskScoringCheckpointer(self.model)
        checkpointer.load(parts.weights, strict=True)
        # The field that is thresholded, with the index of its column if it has several
        self._thresholded: tuple[str, int | None] = SCORE_FIELDS[self.rank_by], None
        if isinstance(score_threshold, str):
            precision, iou = parse_operating_point(score_threshold)
            self._thresholded = MASK_IOU_PROBS, iou_index(iou)
            score_threshold = _accept_threshold(calibrator.accept_thresholds, precision, iou)
        self.score_threshold = score_threshold
        names = checkpointer.loaded_class_names if class_names is None else class_names
        self.metadata = _with_names(parts.metadata, names, self.model)
        use_channels_last_on_cpu(self.model)

    def __call__(self, images: ImageLike | list[ImageLike]) -> dict[str, Any] | list[dict]:
        """
        Args:
            images: an image, or a list of images to predict as one batch. An image is a path, a
                PIL image, or what `cv2.imread` returns: a uint8 array of shape (H, W, 3), BGR.
                Grey images of shape (H, W) or (H, W, 1) and images with an alpha channel (BGRA),
                which is ignored, are accepted. If the config has a scale, pixels of other types
                than uint8 are scaled to 0 to 255.

        Returns:
            for each image a dict with "instances", the best first. They have "scores",
            "pred_mask_ious", "mask_scores", "pred_classes", "pred_boxes" in pixels of the given
            image, and "pred_masks" of shape (N, H, W). "mask_scores" are "scores" x
            "pred_mask_ious". A model with a calibrator adds "mask_iou_probs" of shape (N, 10), the
            probabilities that the mask is a true positive at an IoU of 0.50, 0.55, ..., 0.95;
            their mean, "quality_scores"; and "expected_mask_ious".

        Raises:
            UserError: a file is missing or not an image.
            TypeError, ValueError: an array is not an image as described above.
        """
        if isinstance(images, (list, tuple)):
            return self._predict(images) if images else []
        return self._predict([images])[0]

    @torch.no_grad()
    def _predict(self, images: Sequence[ImageLike]) -> list[dict[str, Any]]:
        arrays = [read_bgr_image(x, self.image_settings) for x in images]
        outputs = self.model([self._model_input(x) for x in arrays])
        for output in outputs:
            instances = output["instances"]
            order = instances.get(SCORE_FIELDS[self.rank_by]).argsort(descending=True, stable=True)
            field, column = self._thresholded
            scores = instances.get(field)
            scores = scores if column is None else scores[:, column]
            output["instances"] = instances[order[scores[order] >= self.score_threshold]]
        return outputs

    def _model_input(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = T.AugInput(image)
        self.augmentations(resized)
        pixels = torch.as_tensor(resized.image.astype("float32").transpose(2, 0, 1))
        return {"image": pixels, "height": height, "width": width}


def _accept_threshold(table: torch.Tensor, precision: float, iou: float) -> float:
    """
    Args:
        table: (10, 99), see :func:`accept_thresholds`.

    Raises:
        UserError: no threshold reached this precision.
    """
    row = table[iou_index(iou)]
    threshold = row[round(100 * precision) - 1].item()
    if threshold < UNREACHED:
        return threshold
    reached = (row < UNREACHED).nonzero()
    highest = f"the highest is {reached[-1].item() + 1} %" if len(reached) else "nor was 1 %"
    raise UserError(
        f"A precision of {precision:.0%} at IoU {iou:.2f} was not reached when the model was "
        f"calibrated ({highest}): ask for a lower precision or a lower IoU."
    )


class _Parts(NamedTuple):
    """What a predictor takes from a config."""

    model: nn.Module
    metadata: Metadata
    input_format: str
    augmentations: T.AugmentationList
    weights: str


def _from_yacs(cfg: CfgNode, device: str | None) -> _Parts:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device or _available(cfg.MODEL.DEVICE)
    short, long = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    return _Parts(
        model=build_model(cfg),
        metadata=_metadata(cfg.DATASETS.TEST),
        input_format=cfg.INPUT.FORMAT,
        augmentations=T.AugmentationList([T.ResizeShortestEdge([short, short], long)]),
        weights=cfg.MODEL.WEIGHTS,
    )


def _from_lazy(cfg: DictConfig, device: str | None) -> _Parts:
    def setting(key: str, default: Any) -> Any:
        value = OmegaConf.select(cfg, key)
        return default if value is None else value

    device = device or _available(setting("train.device", "cuda"))
    mapper = "dataloader.test.mapper"
    # Detectron2's usual size is for configs without test data
    augmentations = setting(f"{mapper}.augmentations", [T.ResizeShortestEdge(800, 1333)])
    return _Parts(
        model=instantiate(cfg.model).to(device),
        metadata=_metadata(setting("dataloader.test.dataset.names", ())),
        input_format=setting(f"{mapper}.image_format", setting("model.input_format", "BGR")),
        augmentations=T.AugmentationList(instantiate(augmentations)),
        weights=setting("train.init_checkpoint", ""),
    )


def _available(device: str) -> str:
    if device.startswith("cuda") and not torch.cuda.is_available():
        logger.info("There is no GPU that PyTorch can use: predicting on the CPU.")
        return "cpu"
    return device


def _metadata(names: str | Sequence[str]) -> Metadata:
    names = [names] if isinstance(names, str) else list(names)
    return MetadataCatalog.get(names[0]) if names else Metadata()


def _with_names(metadata: Metadata, names: Sequence[str] | None, model: nn.Module) -> Metadata:
    """The given metadata if they have these names, or new metadata with only the names."""
    of_data = metadata.get("thing_classes")
    if names is not None and not same(names, of_data or []):
        metadata, of_data = Metadata(thing_classes=list(names)), names
    num_classes = getattr(getattr(model, "roi_heads", None), "num_classes", None)
    if of_data is not None and num_classes is not None and len(of_data) != num_classes:
        whose = "were given" if names is not None else f"are those of '{metadata.get('name')}'"
        raise UserError(
            f"The weights have {num_classes} classes, but the {len(of_data)} names "
            f"({listed(of_data)}) {whose}: give class_names=[...] with the names of the "
            "weights' classes, or a config with their dataset in dataloader.test.dataset.names "
            "(yaml: DATASETS.TEST)."
        )
    return metadata


def read_bgr_image(image: ImageLike, settings: ImageSettings | None = None) -> np.ndarray:
    """
    Args:
        image: a path, a PIL image or an array, as in :class:`MaskScoringPredictor`.
        settings: how to read it; by default images are turned as the camera was held, and those
            with more than 8 bits per pixel are refused.

    Returns:
        uint8 array of shape (H, W, 3), BGR.
    """
    settings = settings or ImageSettings()
    if isinstance(image, (str, os.PathLike)):
        return _read_file(os.fspath(image), settings)
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image, settings))[:, :, ::-1]
    if image is None:
        raise TypeError("The image is None, which cv2.imread returns for files it cannot read.")
    if not isinstance(image, np.ndarray):
        raise TypeError(
            "An image is a path, a PIL image, or a uint8 array of shape (height, width, 3) in BGR "
            f"order, not a {type(image).__module__}.{type(image).__name__}."
        )
    if settings.has_scale and image.dtype != np.uint8 and image.dtype.kind in "uif":
        image = scaled_to_8_bits(image, settings)
    _check_array(image)
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[:, :, :3]


def _read_file(path: str, settings: ImageSettings) -> np.ndarray:
    try:
        with open_image(path, settings) as image:
            return np.asarray(to_rgb(image, settings))[:, :, ::-1]
    except FileNotFoundError:
        hint = ": it is a URL, so download it first" if "://" in path else ""
        raise UserError(f"Image '{path}' does not exist{hint}.") from None
    except UnidentifiedImageError:
        raise UserError(f"'{path}' is not an image that can be read.") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises each of them on bad files
        raise UserError(f"Image '{path}' cannot be read ({error}).") from error


def _check_array(image: np.ndarray) -> None:
    if image.dtype != np.uint8:
        from_0_to_1 = image.size > 0 and image.min() >= 0 and image.max() <= 1
        scale = "multiply it by 255" if from_0_to_1 else "bring it to that range"
        raise ValueError(
            f"An image has uint8 pixels from 0 to 255, not {image.dtype}: {scale}, and convert it "
            "by image.astype(np.uint8)."
        )
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] in (1, 3, 4)):
        advice = "."
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):
            advice = ": its channels come first, so give image.transpose(1, 2, 0)."
        elif image.ndim == 4:
            advice = ". Give several images as a list."
        raise ValueError(f"An image has the shape (height, width, 3), not {image.shape}{advice}")
    if image.size == 0:
        raise ValueError(f"The image is empty: its shape is {image.shape}.")
