"""From images to masks and their scores."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import detectron2.data.transforms as T
from detectron2.config import CfgNode, instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Instances, ROIMasks

from msrcnn_d2_runtime.image_reading import ImageLike, read_bgr_image
from msrcnn_d2_runtime.pipeline import Inputs, predict_all
from msrcnn_d2_runtime.predictions import (
    KEYPOINTS,
    SCORE_NAMES,
    CroppedMasks,
    Masks,
    PredictedImage,
    Predictions,
    RoiMasks,
)
from msrcnn_d2_runtime.ranking import SCORE_FIELDS, Ranking, check_ranking, rank_by_of
from msrcnn_d2_runtime.text import listed

from ..checkpoint import MaskScoringCheckpointer
from ..class_names import same
from ..image_reading import image_settings
from ..modeling import MaskScoringRCNNWithTTA, UnpastedMasks
from ..modeling.acceleration import use_channels_last_on_cpu
from ..utils.errors import UserError

__all__ = ["MaskScoringPredictor"]

logger = logging.getLogger(__name__)


class MaskScoringPredictor:
    """
    Detectron2's `DefaultPredictor` for both kinds of config, one image or a batch.

    Images are read and resized, and their channels ordered, as the config says for evaluation.

    Attributes:
        model: in evaluation mode, with the config's weights; on a CPU in channels-last order, which
            is faster for inference only.
        image_settings: how images are read, such as the scale of 16-bit images.
        class_names: index of a class -> its name, or its index in words if names are unknown.
        ranking: by which score predictions are sorted, and which are left out.
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
        amp: bool = False,
        tta: bool = False,
    ):
        """
        Args:
            cfg: LazyConfig or yacs config, which is not modified. Its `train.init_checkpoint` or
                `MODEL.WEIGHTS` is anything that :meth:`MaskScoringCheckpointer.load` takes.
            rank_by: "quality_score" for the calibrated score, "mask_score", or "score" for the
                class score. By default the first of these that the model has: a plain Mask R-CNN
                has the last only.
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
            amp: predict in mixed precision: float16 on a GPU, bfloat16 on a CPU, where it is
                faster only if the CPU computes in bfloat16.
            tta: test-time augmentation, :class:`MaskScoringRCNNWithTTA`: means over several sizes
                of the image, flipped and not. A yacs config has the sizes in TEST.AUG; for a
                LazyConfig they are 0.5 to 1.5 of the usual one, which is 18 times the work.

        Raises:
            UserError: PyTorch cannot use the device, the weights do not fit the whole model, the
                model lacks the score or the calibrator that is asked for, its detections did not
                reach the precision, or the number of names is not the number of its classes.
        """
        check_ranking(rank_by, score_threshold)
        if not isinstance(cfg, (CfgNode, DictConfig)):
            raise TypeError(
                "cfg is a config, such as from model_zoo.get_config or LazyConfig.load, not a "
                f"{type(cfg).__name__}."
            )
        if device is not None:
            _check_device(device)
        self.image_settings = image_settings(cfg)
        parts = _from_yacs(cfg, device) if isinstance(cfg, CfgNode) else _from_lazy(cfg, device)
        self.model = parts.model.eval()
        self.input_format = parts.input_format
        self.augmentations = parts.augmentations
        roi_heads = getattr(self.model, "roi_heads", None)
        calibrator: Any = getattr(roi_heads, "mask_calibrator", None)
        has_mask_scores = getattr(roi_heads, "mask_iou_head", None) is not None
        rank_by = rank_by_of(rank_by, score_threshold, has_mask_scores, calibrator is not None)
        if not parts.weights:
            raise UserError(
                "The config has no weights to predict with: set train.init_checkpoint (yaml: "
                "MODEL.WEIGHTS) to a checkpoint."
            )
        checkpointer = MaskScoringCheckpointer(self.model)
        checkpointer.load(parts.weights, strict=True)
        table = None if calibrator is None else calibrator.accept_thresholds.cpu().numpy()
        self.ranking = Ranking.of(rank_by, score_threshold, table)
        names = checkpointer.loaded_class_names if class_names is None else class_names
        self.metadata = _with_names(parts.metadata, names, self.model)
        num_classes = getattr(roi_heads, "num_classes", 0)
        self.class_names = tuple(self.metadata.get("thing_classes", map(str, range(num_classes))))
        use_channels_last_on_cpu(self.model)
        self.amp = amp
        self._augmented: nn.Module | None = None
        if tta:
            if not isinstance(self.model, GeneralizedRCNN):
                raise UserError(
                    "Test-time augmentation is for models of Detectron2's class GeneralizedRCNN, "
                    f"not for a {type(self.model).__name__}."
                )
            yacs = cfg if isinstance(cfg, CfgNode) else None
            # One augmented image at a time takes the least memory
            self._augmented = MaskScoringRCNNWithTTA(
                yacs, self.model, batch_size=1, paste_masks=False
            )

    @property
    def rank_by(self) -> str:
        """ "quality_score", "mask_score" or "score": what predictions are sorted by."""
        return self.ranking.rank_by

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
            their mean, "quality_scores"; and "expected_mask_ious". A Panoptic FPN adds "sem_seg"
            and "panoptic_seg"; the "instance_id" of a segment is its index in "instances", or None
            if it was left out of them.

        Raises:
            UserError: a file is missing or not an image.
            TypeError, ValueError: an array is not an image as described above.
        """
        if isinstance(images, (list, tuple)):
            return self._pasted(images) if images else []
        return self._pasted([images])[0]

    def predictions(self, images: Sequence[ImageLike]) -> list[Predictions]:
        """
        Like calling the predictor with a list, but with NumPy arrays, and masks that are not pasted
        yet: large images then need little memory.

        Args, Raises: as for calling it.

        Returns:
            for each image its :class:`Predictions`.
        """
        outputs = self._detect(images) if images else []
        return [self._to_numpy(output["instances"]) for output in outputs]

    def predict_all(self, inputs: Inputs, **options: Any) -> Iterator[PredictedImage]:
        """
        Predict any number of images, of which only a few are in memory.

        Args:
            inputs: a file, a folder, a pattern, a URL, several of these, or images in memory.
            options: batch_size, filter, skip, on_error and num_readers of
                :func:`msrcnn_d2_runtime.pipeline.predict_all`, which this calls.

        Yields:
            each image with its :class:`Predictions`.
        """
        return predict_all(self, inputs, **options)

    def _pasted(self, images: Sequence[ImageLike]) -> list[dict[str, Any]]:
        outputs = self._detect(images)
        for output in outputs:
            instances = output["instances"]
            masks = instances.pred_masks if instances.has("pred_masks") else None
            if isinstance(masks, ROIMasks):
                bitmasks = masks.to_bitmasks(instances.pred_boxes, *instances.image_size)
                instances.pred_masks = bitmasks.tensor
        return outputs

    @torch.no_grad()
    def _detect(self, images: Sequence[ImageLike]) -> list[dict[str, Any]]:
        """Outputs of the model. Instances are selected and sorted before masks are pasted."""
        arrays = [read_bgr_image(x, self.image_settings) for x in images]
        model = self._augmented or self.model
        if model is self.model and UnpastedMasks.supports(self.model):
            model = UnpastedMasks(self.model)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, enabled=self.amp):
            outputs = model([self._model_input(x) for x in arrays])
        for output in outputs:
            instances = output["instances"]
            # As Ranking.order, but on the device of the model, which then waits only once
            thresholded = instances.get(self.ranking.field)
            if self.ranking.column is not None:
                thresholded = thresholded[:, self.ranking.column]
            scores = instances.get(SCORE_FIELDS[self.rank_by])
            order = scores.argsort(descending=True, stable=True)
            order = order[thresholded[order] >= self.ranking.threshold]
            output["instances"] = instances[order]
            if "panoptic_seg" in output:
                segments, infos = output["panoptic_seg"]
                output["panoptic_seg"] = segments, _renumbered(infos, order.tolist())
        return outputs

    def _to_numpy(self, instances: Instances) -> Predictions:
        instances = instances.to("cpu")
        boxes = instances.pred_boxes.tensor.float().numpy()
        masks: Masks
        if isinstance(instances.pred_masks, ROIMasks):
            probs = instances.pred_masks.tensor.float().numpy()
            masks = RoiMasks(probs, boxes, instances.image_size)
        else:
            masks = CroppedMasks.of(instances.pred_masks.numpy())
        return Predictions(
            pred_boxes=boxes,
            pred_classes=instances.pred_classes.numpy(),
            masks=masks,
            scores={
                x: instances.get(x).float().numpy()
                for x in (*SCORE_NAMES, KEYPOINTS)
                if instances.has(x)
            },
            ranking=SCORE_FIELDS[self.rank_by],
        )

    def _model_input(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = T.AugInput(image)
        self.augmentations(resized)
        pixels = torch.as_tensor(resized.image.astype("float32").transpose(2, 0, 1))
        return {"image": pixels, "height": height, "width": width}


def _renumbered(segments_info: list[dict], order: list[int]) -> list[dict]:
    """
    Args:
        segments_info: of a panoptic model.
        order: for each instance that is returned, its "instance_id".

    Returns:
        copies whose "instance_id" is an index of the returned instances; None for one that is not
        returned.
    """
    position = {old: new for new, old in enumerate(order)}
    return [
        {**info, "instance_id": position.get(info["instance_id"])} if info["isthing"] else info
        for info in segments_info
    ]


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


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter if PyTorch is built for CPUs
        raise UserError(
            f"PyTorch cannot use the device '{device}' ({str(error).splitlines()[0]}): choose "
            "another one, such as cpu."
        ) from error


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
