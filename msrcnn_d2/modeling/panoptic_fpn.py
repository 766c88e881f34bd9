"""Panoptic FPN whose instances are merged in the order of a score of their masks."""

from typing import Any

import torch

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, detector_postprocess
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Instances

from msrcnn_d2_runtime.ranking import SCORE_FIELDS
from msrcnn_d2_runtime.scores import SCORES

__all__ = ["MaskScoringPanopticFPN"]

# {rank_by: the part of the ROI heads that predicts this score}
SCORED_BY = {"mask_score": "mask_iou_head", "quality_score": "mask_calibrator"}


@META_ARCH_REGISTRY.register()
class MaskScoringPanopticFPN(PanopticFPN):
    """
    :class:`PanopticFPN` for ROI heads that score their masks.

    Where the masks of two instances overlap, the pixels belong to the instance with the better
    score, and an instance that loses too many of its pixels is left out. Detectron2 compares class
    scores. This model compares the score that `combine_rank_by` names. Which instances take part is
    still decided by the class score: it has to reach `combine_instances_score_thresh`.

    Training, all outputs but "panoptic_seg", and the names in the state dict are those of
    :class:`PanopticFPN`, so weights can be exchanged between the two.
    """

    @configurable
    def __init__(self, *, combine_rank_by: str = "mask_score", **kwargs: Any):
        """
        Args:
            combine_rank_by: "score" for the class score, as in Detectron2; "mask_score"; or
                "quality_score", the calibrated score.
            kwargs: the arguments of :class:`PanopticFPN`.

        Raises:
            ValueError: `combine_rank_by` is none of these, or the ROI heads do not have this score.
        """
        super().__init__(**kwargs)
        if combine_rank_by not in SCORE_FIELDS:
            raise ValueError(
                f"combine_rank_by is {combine_rank_by!r}, not {' or '.join(SCORE_FIELDS)}."
            )
        part = SCORED_BY.get(combine_rank_by)
        if part is not None and getattr(self.roi_heads, part, None) is None:
            raise ValueError(
                f"combine_rank_by is {combine_rank_by!r}, but {type(self.roi_heads).__name__} has "
                f"no {part}: set model.combine_rank_by=score (yaml: "
                "MODEL.PANOPTIC_FPN.COMBINE.RANK_BY score), or use ROI heads that have one."
            )
        self.combine_rank_by = combine_rank_by

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        rank_by = cfg.MODEL.PANOPTIC_FPN.COMBINE.RANK_BY
        return {**super().from_config(cfg), "combine_rank_by": rank_by}

    def inference(self, batched_inputs: list[dict], do_postprocess: bool = True) -> Any:
        """
        Args:
            batched_inputs, do_postprocess: as in :class:`PanopticFPN`.

        Returns:
            as in :class:`PanopticFPN`. In "panoptic_seg", the infos of instances also have all
            other scores: "pred_mask_iou", "mask_score", ...; "score" is the class score.
        """
        detections, sem_segs = super().inference(batched_inputs, do_postprocess=False)
        if not do_postprocess:
            return detections, sem_segs
        outputs = []
        for found, sem_seg, inputs in zip(detections, sem_segs, batched_inputs):
            height, width = found.image_size
            size = inputs.get("height", height), inputs.get("width", width)
            sem_seg = sem_seg_postprocess(sem_seg, found.image_size, *size)
            instances = detector_postprocess(found, *size)
            panoptic_seg = self._combine(instances, sem_seg.argmax(dim=0))
            outputs.append(
                {"sem_seg": sem_seg, "instances": instances, "panoptic_seg": panoptic_seg}
            )
        return outputs

    def _combine(
        self, instances: Instances, semantic_labels: torch.Tensor
    ) -> tuple[torch.Tensor, list[dict]]:
        """
        Args:
            instances: in the output image, with bitmaps as "pred_masks".
            semantic_labels: (H, W), class of each pixel; 0 for things.
        """
        # Detectron2 has one score for the order and for the threshold, at which it stops
        confident = instances.scores >= self.combine_instances_score_thresh
        ranking = instances.get(SCORE_FIELDS[self.combine_rank_by])
        ranked = Instances(
            instances.image_size,
            scores=ranking.where(confident, ranking.new_tensor(-1)),
            pred_masks=instances.pred_masks,
            pred_classes=instances.pred_classes,
        )
        panoptic_seg, segments_info = combine_semantic_and_instance_outputs(
            ranked, semantic_labels, self.combine_overlap_thresh, self.combine_stuff_area_thresh, 0
        )
        scores = {x.key: instances.get(x.field) for x in SCORES.values() if instances.has(x.field)}
        for info in segments_info:
            if info["isthing"]:
                info |= {key: x[info["instance_id"]].item() for key, x in scores.items()}
        return panoptic_seg, segments_info
