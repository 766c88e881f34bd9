"""Exported models: latency by TorchScript, ONNX Runtime and OpenVINO against PyTorch, on a CPU."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image

from benchmarks.measuring import time_in_turn
from benchmarks.models import build_models, model_input, set_number_of_detections
from benchmarks.report import Part, Target
from msrcnn_d2 import MaskScoringPredictor, load_predictor, model_zoo
from msrcnn_d2.export import export_onnx, export_torchscript
from msrcnn_d2.export.graph import OUTPUTS
from msrcnn_d2.export.quantization import quantized
from msrcnn_d2.export.torchscript_file import METADATA_FILE
from msrcnn_d2_runtime.exported import ExportedPredictor
from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor
from msrcnn_d2_runtime.predictor import Predictor

DRAW = Path(__file__).parents[1] / "projects" / "shapes" / "draw.py"
SHORT_EDGES = (800, 400)
NUM_DETECTIONS = 100
NUM_SHAPES = 20  # images of the demo's model in each round, and as many to measure int8's ranges on
MAX_ROUNDS = 3  # for R-50, where one takes a minute
EAGER = "PyTorch, channels-last"
LIMIT = 0.6
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


class TorchScriptPredictor(ExportedPredictor):
    """`OnnxPredictor` for TorchScript files."""

    def __init__(self, path: Path):
        extra_files = {METADATA_FILE: ""}
        self.model = torch.jit.load(path, _extra_files=extra_files)
        metadata = json.loads(extra_files[METADATA_FILE])
        super().__init__(str(path), metadata, rank_by=None, score_threshold=0.0)

    def _output_names(self) -> Sequence[str]:
        return tuple(OUTPUTS.values())

    def _run(self, image: np.ndarray, output_size: np.ndarray) -> Mapping[str, np.ndarray]:
        found = self.model(torch.tensor(image), torch.tensor(output_size))
        return {name: value.numpy() for name, value in found.items()}


class OpenVinoPredictor(OnnxPredictor):
    """OpenVINO in place of ONNX Runtime, for models that do not resize their images."""

    def __init__(self, path: Path):
        import openvino

        super().__init__(path)  # reads the metadata
        # Else it computes in bfloat16 on a CPU that has it
        precision = {"INFERENCE_PRECISION_HINT": "f32"}
        self.model = openvino.compile_model(str(path), "CPU", precision)

    def _run(self, image: np.ndarray, output_size: np.ndarray) -> dict[str, np.ndarray]:
        found = self.model([image])  # the inputs that can be left out are constants for it
        return {name: found[name] for name in self._output_names()}


def run(options) -> list[Part]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = {short_edge: photo_of(short_edge) for short_edge in SHORT_EDGES}
        predictors = exported(r50(folder), folder, [photos[max(SHORT_EDGES)]])
        parts = []
        for short_edge, image in photos.items():
            title = f"R-50-FPN, {image.shape[0]} x {image.shape[1]} pixels"
            limit = LIMIT if short_edge == max(SHORT_EDGES) else None
            parts.append(part(title, predictors, [image], min(options.rounds, MAX_ROUNDS), limit))
        train, val = shapes(folder)
        predictors = exported(load_predictor("demo", device="cpu"), folder, train)
        title = f"The demo's model, {val[0].shape[0]} x {val[0].shape[1]} pixels"
        return [*parts, part(title, predictors, val, options.rounds)]


def photo_of(short_edge: int) -> np.ndarray:
    """The photograph as a predictor takes it, with the size that the model sees."""
    return model_input(short_edge)["image"].numpy().astype(np.uint8).transpose(1, 2, 0)


@torch.no_grad()
def r50(folder: Path) -> MaskScoringPredictor:
    """
    With random weights that find 100 objects in the photograph of either size. It does not resize
    images, so that its files serve both.
    """
    _, model = build_models()
    model.cpu().eval()
    thresholds = []
    for short_edge in SHORT_EDGES:
        images = model.preprocess_image([model_input(short_edge)])
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        set_number_of_detections(model, features, proposals, NUM_DETECTIONS)
        thresholds.append(model.roi_heads.box_predictor.test_score_thresh)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py")
    cfg.train.init_checkpoint = str(folder / "model.pth")
    cfg.dataloader.test.mapper.augmentations = []
    cfg.model.roi_heads.box_predictor.test_score_thresh = min(thresholds)
    return MaskScoringPredictor(cfg, device="cpu")


def shapes(folder: Path) -> list[list[np.ndarray]]:
    """Images drawn for training and for validation."""
    sizes = ["--num-train", str(NUM_SHAPES), "--num-val", str(NUM_SHAPES)]
    draw = [sys.executable, DRAW, folder / "data", *sizes]
    subprocess.run(draw, check=True, capture_output=True)
    return [
        [
            np.asarray(Image.open(path))[:, :, ::-1]
            for path in sorted((folder / "data" / split).iterdir())
        ]
        for split in ("train", "val")
    ]


def exported(
    predict: MaskScoringPredictor, folder: Path, calibration_images: Sequence[np.ndarray]
) -> dict[str, Predictor]:
    """The predictor and those of its files, by what runs them."""
    script, float32, int8 = (folder / x for x in ("model.ts", "float32.onnx", "int8.onnx"))
    export_torchscript(predict, script)
    export_onnx(predict, float32)
    # Not by `export_onnx`, whose check fails: what random weights find, rounding decides
    model = onnx.load(float32)
    metadata = {x.key: x.value for x in model.metadata_props} | {"precision": "int8"}
    settings = predict.image_settings
    onnx.save(quantized(model, calibration_images, settings, metadata)[0], int8)
    predictors = {
        EAGER: predict,
        "TorchScript": TorchScriptPredictor(script),
        "ONNX Runtime, float32": OnnxPredictor(float32),
        "ONNX Runtime, int8": OnnxPredictor(int8),
    }
    if HAS_OPENVINO:
        predictors["OpenVINO, float32"] = OpenVinoPredictor(float32)
        predictors["OpenVINO, int8"] = OpenVinoPredictor(int8)
    return predictors


def mebibytes(predictor: Predictor) -> float | None:
    """Size of the file, if it is one."""
    if not isinstance(predictor, ExportedPredictor):
        return None
    return Path(predictor.path).stat().st_size / 2**20


def part(
    title: str,
    predictors: Mapping[str, Predictor],
    images: Sequence[np.ndarray],
    rounds: int,
    limit: float | None = None,
) -> Part:
    """
    Args:
        limit: what the fastest file is to take at most, as a share of PyTorch's time.
    """
    detections: dict[str, float] = {}

    def predict(name: str) -> None:
        found = [predictors[name].predictions([image])[0] for image in images]
        detections[name] = sum(map(len, found)) / len(images)

    timings = time_in_turn({name: partial(predict, name) for name in predictors}, rounds)
    eager = timings[EAGER]
    ratios = {name: t.ratio_to(eager) for name, t in timings.items()}
    rows = [
        [
            name,
            1000 * t.median / len(images),
            ratios[name],
            detections[name],
            mebibytes(predictors[name]),
        ]
        for name, t in timings.items()
    ]
    targets, notes = [], []
    if limit is not None:
        targets.append(Target(f"the fastest file / {EAGER}", min(ratios.values()), limit))
    if not HAS_OPENVINO:
        notes.append("OpenVINO is left out, as it is not installed: run `pip install openvino`.")
    return Part(
        f"Latency of exported models: {title}, on the CPU",
        ["", "ms per image", "ratio", "detections per image", "MiB"],
        rows,
        targets,
        notes,
        data={name: t.as_dict() for name, t in timings.items()},
    )
