"""
Write a model into one file that runs without Detectron2: ONNX, which needs no PyTorch either, or
TorchScript.

The file has the whole inference: it resizes the image, normalises it, finds objects, scales their
boxes to the image, pastes masks if that is asked for, and sorts everything by the ranking score.

**The format**, version 1. An ONNX file has opset 17. All arrays are dense; N is the number of
detections, which may be 0.

Inputs:

image
    uint8 (H, W, 3), RGB, of any size. For one image at a time.
output_size
    int64 (2,), optional: height and width in pixels of the image that boxes and masks are for. The
    default (0, 0) stands for the size of `image`. It serves callers that resize images themselves:
    they give the image that the model should see, and the size of the original.
score_threshold
    float32 scalar (in TorchScript a float), optional: detections whose class score is not above it
    are left out. The default is that of the model's config.

An image that already has the size that the rule `resize` asks for is not resized. Others are
resized as Pillow does with BILINEAR, with equal pixels (or in images more than twice as high as
wide values that differ by 1 at most, as between versions of Pillow); Pillow itself is faster.

Outputs, the best detection first; a model has the first three, and those of the others that it
predicts:

boxes
    float32 (N, 4), XYXY in pixels, clipped to the image. None is empty.
classes
    int64 (N,), index into `class_names`.
scores
    float32 (N,), class scores.
pred_mask_ious, mask_scores
    float32 (N,), predicted IoU of each mask, and class score x predicted IoU.
quality_scores, expected_mask_ious, mask_iou_probs
    float32 (N,), (N,) and (N, 10), of a calibrator.
masks
    "unpasted": float32 (N, S, S), the probabilities in S x S cells of each box. A pixel belongs to
    the object where their bilinear interpolation at its center, with 0 outside of the box, is 0.5
    or more. "pasted": bool (N, H, W), one bitmap of the image for each object, or of `output_size`.

Metadata, all strings: `metadata_props` in ONNX; in TorchScript, an object in the extra file
"metadata.json". Values other than plain text are JSON:

format, format_version
    "msrcnn_d2" and "1". The version changes if a reader of the old one would be wrong.
msrcnn_d2_version
    of the program that wrote the file.
class_names
    a list of strings.
channel_order
    "RGB", of `image`.
resize
    {"short_edge": s, "max_size": m}: the shorter side becomes s, unless the longer one would be
    longer than m, which it then gets; sizes are rounded. null: images stay as they are.
pixel_mean, pixel_std
    three numbers each, in the order of `channel_order`. The file does this itself.
image_settings
    the fields of :class:`msrcnn_d2_runtime.image_reading.ImageSettings`: how images are read.
ranking
    the output that detections are sorted by: "quality_scores", "mask_scores" or "scores".
masks
    "unpasted" or "pasted".
score_threshold, nms_threshold, max_detections
    of the config, as JSON numbers. The latter two are fixed.
accept_thresholds
    only with a calibrator: 10 lists of 99 numbers, see
    :class:`~.MaskCalibrator`.
precision
    "float32" or "int8".
"""

from .exporting import Exported, export_onnx, export_torchscript

__all__ = ["Exported", "export_onnx", "export_torchscript"]
