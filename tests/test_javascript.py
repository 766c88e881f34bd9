"""The JavaScript code of docs/deploy.md finds what `OnnxPredictor` finds."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor
from tests.helpers.onnx_files import OUTPUTS, metadata, write_onnx

PAGE = Path(__file__).parent.parent / "docs" / "deploy.md"
NEEDED = "require('onnxruntime-web'); require('sharp')"


def test_the_code_of_the_documentation(tmp_path):
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", NEEDED], capture_output=True).returncode:
        pytest.skip("needs Node with onnxruntime-web and sharp, which NODE_PATH may name")
    (code,) = re.findall(r"```js\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "detect.js").write_text(code)
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    outputs = {**OUTPUTS, "masks": np.ones((3, 4, 4), dtype=np.float32)}
    model = write_onnx(tmp_path / "model.onnx", outputs, metadata())
    ran = subprocess.run(
        [node, "detect.js", model, "image.png"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = np.array([line.split() for line in ran.stdout.splitlines()], dtype=float)
    expected = OnnxPredictor(model)(str(tmp_path / "image.png"))["instances"]
    np.testing.assert_array_equal(found[:, 0], expected.pred_classes)
    np.testing.assert_allclose(found[:, 1], expected.mask_scores, rtol=1e-6)
    np.testing.assert_allclose(found[:, 2:], expected.pred_boxes, rtol=1e-6)
