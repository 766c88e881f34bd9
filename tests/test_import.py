"""`import msrcnn_d2`, which is what users do first."""

import subprocess
import sys


def run_python(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )


def test_without_detectron2_it_says_how_to_get_it():
    ran = run_python("import sys; sys.modules['detectron2'] = None; import msrcnn_d2")
    last_line = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1
    assert last_line.startswith("ModuleNotFoundError: msrcnn_d2 needs Detectron2")
    assert "pip install ./packaging/detectron2" in last_line


def test_it_registers_the_heads():
    ran = run_python(
        "import msrcnn_d2; from detectron2.modeling import ROI_HEADS_REGISTRY as r;"
        "print([n in r for n in ('MaskScoringROIHeads', 'CascadeMaskScoringROIHeads')],"
        "'MaskIoUHead' in msrcnn_d2.modeling.ROI_MASK_IOU_HEAD_REGISTRY)"
    )
    assert ran.stdout.strip() == "[True, True] True"
