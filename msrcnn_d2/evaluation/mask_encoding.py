"""Predicted masks of Detectron2's types in COCO's run-length encoding."""

from detectron2.structures import BitMasks, Instances, ROIMasks

from msrcnn_d2_runtime.mask_encoding import encode_bitmasks, encode_roi_masks

__all__ = ["encode_predicted_masks"]


def encode_predicted_masks(instances: Instances) -> list[dict]:
    """
    Args:
        instances: predictions with "pred_masks": full-size masks (N x H x W, a tensor or
            `BitMasks`), or `ROIMasks` (N x M x M, probabilities) that belong to "pred_boxes".

    Returns:
        for each instance the compressed RLE of its mask, with "counts" as a string.
    """
    masks = instances.pred_masks
    if isinstance(masks, ROIMasks):
        probs, boxes = (
            x.detach().cpu().float().numpy() for x in (masks.tensor, instances.pred_boxes.tensor)
        )
        return encode_roi_masks(probs, boxes, instances.image_size)
    masks = masks.tensor if isinstance(masks, BitMasks) else masks
    return encode_bitmasks(masks.cpu().numpy())
