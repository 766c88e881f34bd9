"""The wheel: what is in it, and that it works in an empty folder, without the repository."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import draw
from msrcnn_d2 import model_zoo

ROOT = Path(__file__).parents[1]
PACKAGES = ("msrcnn_d2", "msrcnn_d2_cli", "msrcnn_d2_runtime", "msrcnn_d2_web")
DEMO_MODEL = ("ms_rcnn_shapes.safetensors", "ms_rcnn_shapes.py", "mask_rcnn_shapes.py")
REPOSITORY = "https://example.org/someone/msrcnn_d2"  # of a release


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this repository is unpacked to."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for folder in (*PACKAGES, "configs", "projects/shapes"):
        shutil.copytree(ROOT / folder, source / folder)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    env = {**os.environ, "MSRCNN_D2_REPOSITORY": REPOSITORY}
    command = [sys.executable, "-c", build]
    subprocess.run(command, cwd=source, env=env, check=True, capture_output=True)
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target


@pytest.fixture
def python(installed, tmp_path):
    """Runs Python with the wheel in an empty folder."""

    def run(*args):
        return subprocess.run(
            [sys.executable, "-W", "ignore", *args],
            cwd=tmp_path,
            # Before the repository, which is installed as an editable package
            env={**os.environ, "PYTHONPATH": str(installed), "DETECTRON2_DATASETS": "none"},
            capture_output=True,
            text=True,
        )

    return run


def files_of(*folders):
    """Paths of what a wheel has to contain, relative to the folder."""
    return {
        str(path.relative_to(folder.parent))
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml", ".jinja", ".js", ".css", ".jpg", ".typed")
    }


def test_it_has_all_files_and_no_others(installed):
    metadata_folder = next(installed.glob("*.dist-info"))
    assert {x.name for x in installed.iterdir()} == {*PACKAGES, metadata_folder.name}
    expected = files_of(*(ROOT / x for x in PACKAGES))
    expected |= {f"msrcnn_d2/{path}" for path in files_of(ROOT / "configs")}
    expected |= {f"msrcnn_d2/shapes/{name}" for name in DEMO_MODEL}
    found = {
        str(path.relative_to(installed))
        for path in installed.rglob("*")
        if path.is_file() and metadata_folder not in path.parents
    }
    assert found == expected


def test_its_description_has_no_relative_links(installed):
    """Pictures and links of README.md lead into the repository when a package index shows it."""
    text = (next(installed.glob("*.dist-info")) / "METADATA").read_text()
    assert f"]({REPOSITORY}/raw/HEAD/projects/shapes/ranking.png)" in text
    assert f"]({REPOSITORY}/blob/HEAD/docs/train.md)" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert len(targets) > 20 and all(x.startswith("https://") for x in targets)


def test_it_has_the_command(installed):
    entry_points = configparser.ConfigParser()
    entry_points.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"msrcnn-d2": "msrcnn_d2_cli:main"}
    (found,) = metadata.distributions(name="msrcnn-d2", path=[str(installed)])
    extras = set(found.metadata.get_all("Provides-Extra"))
    assert {"completion", "demo", "web", "test"} <= extras
    assert found.metadata["Requires-Python"] == ">=3.10"


FIND_CONFIGS = """
from msrcnn_d2 import model_zoo
from msrcnn_d2_cli import main
main(["zoo", "ms_rcnn_R_50_FPN_1x"])
for name in model_zoo.config_names():
    print("path    ", model_zoo.get_config_file(name))
print("read    ", model_zoo.get_config(name).SOLVER.MAX_ITER)
"""


def test_it_finds_its_configs(installed, python):
    ran = python("-c", FIND_CONFIGS)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, list[str]] = {}
    for line in ran.stdout.splitlines():
        kind, text = line.split(None, 1)
        found.setdefault(kind, []).append(text)
    assert len(found["config"]) == 2 and set(found["config"]) < set(found["path"])
    expected = {installed / "msrcnn_d2" / "configs" / name for name in model_zoo.config_names()}
    assert set(map(Path, found["path"])) == expected and len(expected) == 16
    assert found["read"] == ["180000"]


def test_it_trains_by_the_name_of_a_config(python):
    """As far as it gets without COCO."""
    config = "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py"
    ran = python("-m", "msrcnn_d2_cli", "train", "--config-file", config)
    assert ran.returncode == 2 and "DETECTRON2_DATASETS" in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr


LOAD_DEMO = """
from msrcnn_d2.prediction.loading import demo_model, load_predictor
print(demo_model(), *load_predictor("demo", device="cpu").class_names)
"""


def test_it_has_the_model_of_the_demo(installed, python):
    ran = python("-c", LOAD_DEMO)
    assert ran.returncode == 0, ran.stderr
    path, *class_names = ran.stdout.split()
    assert Path(path) == installed / "msrcnn_d2" / "shapes" / DEMO_MODEL[0]
    assert class_names == list(draw.CLASSES)
