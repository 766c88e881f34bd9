"""`import msrcnn_d2`, which is what users do first, and what the modules import from each other."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import msrcnn_d2

ROOT = Path(__file__).parent.parent
# A room imports from those above it in this table. Rooms of one line do not know each other.
LAYERS = [
    ["msrcnn_d2_runtime"],
    ["utils"],
    ["published_models", "class_names", "image_reading", "coco_format"],
    ["modeling", "checkpoint"],
    ["evaluation", "dataset_check"],
    ["annotation_tools"],
    ["config"],
    ["model_zoo", "report"],
    ["engine"],
    ["calibration", "prediction"],
    ["export"],
    ["msrcnn_d2", "msrcnn_d2_web"],  # the former is __init__.py
    ["msrcnn_d2_cli"],
]
# What `import msrcnn_d2` leaves for when it is needed. Detectron2 itself imports cv2 if it can.
LATE = [
    "matplotlib.pyplot",
    "pycocotools.cocoeval",
    "faster_coco_eval",
    *(f"msrcnn_d2.{room}" for layer in LAYERS[1:-2] for room in layer),
]
EARLY = ["msrcnn_d2.utils", "msrcnn_d2.modeling"]


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


def test_it_registers_the_heads_and_imports_little_else():
    ran = run_python(
        "import sys; import msrcnn_d2; from detectron2.modeling import ROI_HEADS_REGISTRY as r;"
        "print([n in r for n in ('MaskScoringROIHeads', 'CascadeMaskScoringROIHeads')],"
        "'MaskIoUHead' in msrcnn_d2.modeling.ROI_MASK_IOU_HEAD_REGISTRY);"
        "print(*sys.modules)"
    )
    registered, modules = ran.stdout.strip().splitlines()
    assert registered == "[True, True] True"
    assert not set(LATE).difference(EARLY).intersection(modules.split())


def test_what_needs_no_pytorch_does_not_import_it():
    """All modules of the runtime, in an interpreter that has none of what it must not need."""
    names = [name for name in modules() if room_of(name) == "msrcnn_d2_runtime"]
    code = "import sys; sys.modules.update(torch=None, detectron2=None, msrcnn_d2=None)\n"
    ran = run_python(code + "\n".join(f"import {name}" for name in names))
    assert ran.returncode == 0, ran.stderr
    code = "import sys, msrcnn_d2_runtime as r; print({x.split('.')[0] for x in sys.modules})"
    imported = run_python(code).stdout
    assert not any(f"'{x}'" in imported for x in ("cv2", "pycocotools", "matplotlib"))


def test_without_opencv_only_drawing_fails_and_says_what_to_install():
    ran = run_python(
        "import sys; sys.modules['cv2'] = None\n"
        "from msrcnn_d2 import MaskScoringPredictor, MaskScoringCOCOEvaluator, model_zoo\n"
        "from msrcnn_d2 import MaskScoringVisualizer"
    )
    last_line = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1
    assert last_line.startswith("ModuleNotFoundError: Drawing needs OpenCV"), ran.stderr
    assert "pip install" in last_line


@pytest.mark.parametrize("name", msrcnn_d2.__all__)
def test_what_users_import_is_there(name):
    namespace = {}
    exec(f"from msrcnn_d2 import {name} as found", namespace)
    assert namespace["found"] is getattr(msrcnn_d2, name)
    assert name in dir(msrcnn_d2)


def test_type_checkers_know_what_users_import():
    tree = ast.walk(ast.parse((ROOT / "msrcnn_d2/__init__.py").read_text()))
    imported = {x.name for node in tree if isinstance(node, ast.ImportFrom) for x in node.names}
    assert set(msrcnn_d2.__all__) <= imported


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'MaskScorer'"):
        msrcnn_d2.MaskScorer  # noqa: B018


# ---- what modules import from each other


def modules() -> dict[str, Path]:
    """The modules of our packages, by their dotted names."""
    found = {}
    for path in ROOT.glob("msrcnn_d2*/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> list[tuple[str, str, int]]:
    """
    What a module imports from our packages, at the top or anywhere else: the module, the name in
    it ("" for all of it), and the line.
    """
    found = []
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(x.name, "", node.lineno) for x in node.names if x.name in known]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            for x in node.names if module in known else []:
                is_module = f"{module}.{x.name}" in known
                found.append(
                    (f"{module}.{x.name}", "", node.lineno)
                    if is_module
                    else (module, x.name, node.lineno)
                )
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "msrcnn_d2" and len(parts) > 1 else parts[0]


def test_modules_do_not_import_in_circles():
    known = modules()
    graph = {name: {m for m, _, _ in imports_of(name, path, known)} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"These modules import each other: {' -> '.join(error.args[1])}")


def test_rooms_import_only_from_the_rooms_below():
    known = modules()
    level = {room: k for k, layer in enumerate(LAYERS) for room in layer}
    assert {room_of(name) for name in known} <= {*level}
    wrong = []
    for name, path in known.items():
        room = room_of(name)
        for module, _, line in imports_of(name, path, known):
            other = room_of(module)
            if other != room and level[other] >= level[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_private_names_stay_in_their_room():
    known = modules()
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {attribute or module}"
        for name, path in known.items()
        for module, attribute, line in imports_of(name, path, known)
        if room_of(module) != room_of(name)
        and any(x.startswith("_") and not x.endswith("__") for x in [attribute, *module.split(".")])
    ]
    assert not wrong, "\n".join(wrong)
