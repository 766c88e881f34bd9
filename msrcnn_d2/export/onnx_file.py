"""Models as ONNX files."""

import io
import warnings
from typing import Any

import numpy as np
import torch

from ..utils.errors import UserError
from .graph import InferenceGraph, Operators, moved_apart

__all__ = ["OPSET", "Session", "onnx_operators", "onnx_model"]

OPSET = 17
MAX_BYTES = 2**31 - 1  # of a protobuf message
INPUTS = ("image", "output_size", "score_threshold")


def import_onnx() -> tuple[Any, Any]:
    """The packages onnx and onnxruntime."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(
            f"Export to ONNX needs {error.name}, which is not installed: run `pip install "
            '"msrcnn-d2[export]"`, or `pip install ".[export]"` in the repository.'
        ) from None
    return onnx, onnxruntime


class Session:
    """
    Runs an ONNX model on the CPU.

    Attributes:
        names: of its outputs.
    """

    def __init__(self, model: bytes):
        _, onnxruntime = import_onnx()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it would warn of inputs that have defaults
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.names = [x.name for x in self.session.get_outputs()]

    def __call__(
        self, image: np.ndarray, score_threshold: float | None = None
    ) -> dict[str, np.ndarray]:
        """
        Args:
            image: uint8 (H, W, 3), RGB.
            score_threshold: None for the default.
        """
        inputs = {"image": image}
        if score_threshold is not None:
            inputs["score_threshold"] = np.array(score_threshold, dtype=np.float32)
        return dict(zip(self.names, self.session.run(None, inputs), strict=True))


def onnx_model(graph: InferenceGraph, example: tuple[torch.Tensor, ...], metadata: dict) -> Any:
    """
    Args:
        graph: with :func:`onnx_operators`.
        example: arguments of its `forward`.
        metadata: see :func:`metadata_of`.

    Returns:
        an `onnx.ModelProto`.

    Raises:
        UserError: the model is too large for the format.
    """
    onnx, _ = import_onnx()
    num_bytes = sum(4 * x.numel() for x in graph.model.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"The model has {num_bytes / 2**30:.1f} GiB of weights, but an ONNX file has at most "
            "2 GiB: export it to TorchScript."
        )
    outputs = list(graph(*example))
    axes: dict[str, dict[int, str]] = {name: {0: "detections"} for name in outputs}
    axes["image"] = {0: "height", 1: "width"}
    if graph.paste_masks:
        axes["masks"] |= {1: "output_height", 2: "output_width"}
    buffer: Any = io.BytesIO()  # as the older exporter takes it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing takes for a constant; it is compared
        torch.onnx.export(
            graph,
            example,
            buffer,
            input_names=list(INPUTS),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    round_down_by_remainder(model.graph)
    remove_unused(model.graph)
    defaults = {
        "output_size": np.zeros(2, np.int64),
        "score_threshold": np.array(float(metadata["score_threshold"]), np.float32),
    }
    # An input that has an initial value can be left out
    for name, value in defaults.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.helper.set_model_props(model, metadata)
    return model


def round_down_by_remainder(graph: Any) -> None:
    """
    Replace x / n * n of whole numbers, by which Detectron2 pads images to a multiple of n, by
    x - x mod n. OpenVINO 2026.4 takes the first one for x.

    Args:
        graph: an `onnx.GraphProto`.
    """
    onnx, _ = import_onnx()
    producers = {name: node for node in graph.node for name in node.output}

    def constant(name: str) -> np.ndarray | None:
        node = producers.get(name)
        if node is None or node.op_type != "Constant":
            return None
        return onnx.numpy_helper.to_array(node.attribute[0].t)

    for position, node in reversed([*enumerate(graph.node)]):
        if node.op_type != "Mul":
            continue
        division = producers.get(node.input[0])
        while division is not None and division.op_type == "Cast":
            division = producers.get(division.input[0])
        if division is None or division.op_type != "Div":
            continue
        divisor, factor = constant(division.input[1]), constant(node.input[1])
        if divisor is None or factor is None or divisor.dtype.kind != "i":
            continue
        if np.array_equal(divisor, factor):
            x, n = division.input
            (result,) = node.output
            remainder = f"{result}_remainder"
            graph.node.remove(node)
            graph.node.insert(position, onnx.helper.make_node("Mod", [x, n], [remainder]))
            rest = onnx.helper.make_node("Sub", [x, remainder], [result])
            graph.node.insert(position + 1, rest)


def remove_unused(graph: Any) -> None:
    """
    Remove nodes whose outputs nothing uses: ONNX Runtime would warn of them at each start.

    Args:
        graph: an `onnx.GraphProto`.
    """
    while True:
        used = {x.name for x in graph.output} | names_read(graph)
        unused = [node for node in graph.node if used.isdisjoint(node.output)]
        if not unused:
            return
        for node in unused:
            graph.node.remove(node)


def names_read(graph: Any) -> set[str]:
    """The inputs of all nodes, also of those in branches and loops."""
    names = set()
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            # Branches can end with a value from outside
            names.update(x.name for x in attribute.g.output)
            names |= names_read(attribute.g)
    return names


class _NonMaxSuppression(torch.autograd.Function):
    """The operator of ONNX, for each class by itself."""

    @staticmethod
    def forward(
        ctx: Any, boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float
    ) -> torch.Tensor:
        """
        Args:
            boxes: (1, N, 4), XYXY.
            scores: (1, K, N) for K classes; those above 0 take part.

        Returns:
            int64 (M, 3): image, class, and index of each box that is kept.
        """
        kept = []
        for k, of_class in enumerate(scores[0]):
            (indices,) = (of_class > 0).nonzero(as_tuple=True)
            nms = torch.ops.torchvision.nms(boxes[0][indices], of_class[indices], iou_threshold)
            rows = [torch.zeros_like(nms), torch.full_like(nms, k), indices[nms]]
            kept.append(torch.stack(rows, dim=1))
        return torch.cat(kept)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float) -> Any:
        most, iou, lowest = (
            g.op("Constant", value_t=torch.tensor([value], dtype=dtype))
            for value, dtype in (
                (2**31 - 1, torch.int64),
                (iou_threshold, torch.float32),
                (0, torch.float32),
            )
        )
        return g.op("NonMaxSuppression", boxes, scores, most, iou, lowest)


def onnx_operators(num_groups: int) -> Operators:
    """
    Args:
        num_groups: classes of the model, or levels of its feature pyramid if they are more.
    """

    def best_first(scores: torch.Tensor) -> torch.Tensor:
        # Becomes TopK, which keeps the order of equal scores. The exporter knows no stable sort
        return scores.sort(descending=True).indices

    def nms(
        boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
    ) -> torch.Tensor:
        order = best_first(scores)
        boxes = moved_apart(boxes, idxs)[order]
        # Ranks in place of scores: N for the best box, so that all are positive and different
        num_boxes: Any = torch._shape_as_tensor(scores)[0]
        ranks = (num_boxes - torch.arange(num_boxes)).float()
        is_of = (idxs[order] == torch.arange(num_groups)[:, None]).float()
        kept = _NonMaxSuppression.apply(boxes[None], (is_of * ranks)[None], iou_threshold)
        return order[kept[:, 2].sort().values]

    return Operators(nms, best_first)
