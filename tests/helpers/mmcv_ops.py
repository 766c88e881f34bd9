"""
mmcv's compiled operators, as far as Mask Scoring R-CNN needs them, from torchvision.

mmcv is compiled for few versions of PyTorch. mmcv-lite is its Python without what is compiled, but
MMDetection imports `mmcv.ops` whatever the model, and that asks the compiled module `mmcv._ext` for
all of its operators. A Mask Scoring R-CNN calls only two of them.
"""

import importlib.machinery
import importlib.util
import sys
import types

import torchvision


class _Operators(types.ModuleType):
    """Has every operator that one asks for; all but those below refuse to run."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"{__file__} stands in for mmcv's operators, without {name}")

        return missing


def nms(boxes, scores, iou_threshold, offset):
    """Indices of the boxes that are kept, best first."""
    assert offset == 0, "boxes of inclusive pixel coordinates"
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def roi_align_forward(
    features,
    rois,
    output,
    argmax_y,
    argmax_x,
    *,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
):
    """Write into `output`; `argmax_y` and `argmax_x` are those of maximum pooling."""
    assert pool_mode == 1, "maximum pooling, not average"
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned)
    )


def install():
    """Stand in for `mmcv._ext` where there is none; call it before importing `mmdet.models`."""
    if importlib.util.find_spec("mmcv._ext") is None:
        operators = _Operators("mmcv._ext")
        operators.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
        operators.nms = nms
        operators.roi_align_forward = roi_align_forward
        sys.modules["mmcv._ext"] = operators
