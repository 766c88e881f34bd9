"""Small ONNX files in the format of `msrcnn_d2.export`, with known outputs."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Sorted by mask score, as an exported model sorts them
OUTPUTS = {
    "boxes": np.array([[1, 2, 9, 12], [3, 4, 8, 9], [0, 0, 20, 10]], dtype=np.float32),
    "classes": np.array([1, 0, 1], dtype=np.int64),
    "scores": np.array([0.8, 0.6, 0.9], dtype=np.float32),
    "pred_mask_ious": np.array([0.75, 0.75, 0.25], dtype=np.float32),
    "mask_scores": np.array([0.6, 0.45, 0.225], dtype=np.float32),
}
CALIBRATED = {
    "quality_scores": np.array([0.2, 0.5, 0.4], dtype=np.float32),
    "expected_mask_ious": np.array([0.2, 0.5, 0.4], dtype=np.float32),
    "mask_iou_probs": np.linspace(0.9, 0.0, 30, dtype=np.float32).reshape(3, 10),
}


def metadata(**changes) -> dict[str, str]:
    """Those of a model with two classes; None leaves a value out."""
    values = {
        "format": "msrcnn_d2",
        "format_version": "1",
        "msrcnn_d2_version": "0.1.0",
        "class_names": json.dumps(["cat", "dog"]),
        "channel_order": "RGB",
        "resize": json.dumps({"short_edge": 8, "max_size": 12}),
        "image_settings": json.dumps({"apply_exif": True, "intensity_range": None}),
        "ranking": "mask_scores",
        "masks": "unpasted",
        "score_threshold": "0.05",
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def write_onnx(path, outputs, metadata=None) -> str:
    """
    Write a model that finds the same objects in every image.

    Args:
        outputs: arrays by their names; or the name of an input ("image", "output_size"), which the
            output then repeats, as float32.
    """
    nodes, infos = [], []
    # An input with an initial value can be left out
    constants = [numpy_helper.from_array(np.zeros(2, np.int64), "output_size")]
    for name, value in outputs.items():
        if isinstance(value, str):
            nodes.append(helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT))
            infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
            continue
        constants.append(numpy_helper.from_array(value, f"{name}_"))
        nodes.append(helper.make_node("Identity", [f"{name}_"], [name]))
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        infos.append(helper.make_tensor_value_info(name, kind, value.shape))
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3]),
        helper.make_tensor_value_info("output_size", TensorProto.INT64, [2]),
    ]
    graph = helper.make_graph(nodes, "known", inputs, infos, constants)
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return str(path)
