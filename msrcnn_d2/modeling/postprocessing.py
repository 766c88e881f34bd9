"""Scale detections to the given image, but leave masks as they were predicted in their boxes."""

import torch
from torch import nn

from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances, ROIMasks

from .retrofit import RetrofitRCNN
from .roi_heads import DetectedBoxes

__all__ = ["UnpastedMasks", "rescale_unpasted"]

_RESCALED = ("pred_boxes", "pred_keypoints")  # what `detector_postprocess` changes, besides masks


class UnpastedMasks(nn.Module):
    """
    A model in inference whose "pred_masks" are :class:`ROIMasks`: probabilities of shape
    (N, S, S), S x S cells to a box, instead of a bitmap of the whole image for each object.

    All other outputs are those of the model; hooks of the model itself are not called. Use it with
    evaluators that accept such masks, as ours does. Pasting masks only to encode them again would
    cost more than the rest of the evaluator.
    """

    def __init__(self, model: GeneralizedRCNN):
        """
        Args:
            model: a model that :meth:`supports`.
        """
        super().__init__()
        self.model = model
        self.training = model.training

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether the outputs of `model` are those of Detectron2, with nothing added to them."""
        return (
            isinstance(model, GeneralizedRCNN)
            and type(model).inference is GeneralizedRCNN.inference
            and type(model).forward in (GeneralizedRCNN.forward, RetrofitRCNN.forward)
        )

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """
        Args and returns as in :class:`GeneralizedRCNN` in inference, except for the masks.
        """
        results = self.model.inference(batched_inputs, do_postprocess=False)
        outputs = []
        for x, inputs in zip(results, batched_inputs):
            height, width = x.image_size
            size = inputs.get("height", height), inputs.get("width", width)
            outputs.append({"instances": rescale_unpasted(x, *size)})
        return outputs


def rescale_unpasted(results: Instances, height: int, width: int) -> Instances:
    """
    Like :func:`detector_postprocess`, but without pasting masks.

    Args:
        results: detections in the image that the model saw, with "pred_masks" of shape
            (N, 1, S, S) if it predicts masks.
        height, width: size of the output image, in pixels.

    Returns:
        the detections whose box in that image is not empty, with "pred_masks" as
        :class:`ROIMasks`.
    """
    fields = dict(results.get_fields())
    # Copies, since Detectron2 scales them in place
    geometry = {k: fields.pop(k).clone() for k in _RESCALED if k in fields}
    geometry["pred_boxes"] = DetectedBoxes(geometry["pred_boxes"].tensor)
    # This finds the boxes that are left with one synchronisation. If Detectron2 got all fields, it
    # would need one for each of them
    kept = torch.arange(results.pred_boxes.tensor.shape[0], device=results.pred_boxes.device)
    rescaled = detector_postprocess(
        Instances(results.image_size, **geometry, kept=kept), height, width
    )
    kept = rescaled.kept
    rescaled.remove("kept")
    for name, value in Instances(results.image_size, **fields)[kept].get_fields().items():
        rescaled.set(name, ROIMasks(value[:, 0]) if name == "pred_masks" else value)
    return rescaled
