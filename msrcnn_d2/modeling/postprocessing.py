"""Detections in pixels of the given image, their masks left as they were predicted."""

import torch
from torch import nn

from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances, ROIMasks

from .retrofit import RetrofitRCNN

__all__ = ["UnpastedMasks", "rescale_unpasted"]

_RESCALED = ("pred_boxes", "pred_keypoints")  # what `detector_postprocess` changes, besides masks


class UnpastedMasks(nn.Module):
    """
    A model in inference whose "pred_masks" are :class:`ROIMasks`: probabilities of shape
    (N, S, S), S x S cells to a box, in place of a bitmap of the whole image for each object.

    All else is as in the model; hooks of the model itself are not called. For evaluators that take
    such masks, as ours does: pasting them only to encode them again costs more than all other
    things that it does.
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
        return [
            {"instances": rescale_unpasted(x, *_output_size(x, inputs))}
            for x, inputs in zip(results, batched_inputs)
        ]


def _output_size(results: Instances, inputs: dict) -> tuple[int, int]:
    height, width = results.image_size
    return inputs.get("height", height), inputs.get("width", width)


def rescale_unpasted(results: Instances, height: int, width: int) -> Instances:
    """
    :func:`detector_postprocess` that does not paste masks.

    Args:
        results: detections in the image that the model saw, with "pred_masks" of shape
            (N, 1, S, S) if it predicts masks.
        height, width: of the image that they are wanted for, in pixels.

    Returns:
        the detections whose box is not empty there, with "pred_masks" as :class:`ROIMasks`.
    """
    fields = dict(results.get_fields())
    # Copies, since Detectron2 scales them in place
    geometry = {k: fields.pop(k).clone() for k in _RESCALED if k in fields}
    # Which boxes are left is asked once; with all fields Detectron2 would wait for a GPU for each
    kept = torch.arange(len(results), device=results.pred_boxes.device)
    rescaled = detector_postprocess(
        Instances(results.image_size, **geometry, kept=kept), height, width
    )
    kept = rescaled.kept
    rescaled.remove("kept")
    for name, value in Instances(results.image_size, **fields)[kept].get_fields().items():
        rescaled.set(name, ROIMasks(value[:, 0]) if name == "pred_masks" else value)
    return rescaled
