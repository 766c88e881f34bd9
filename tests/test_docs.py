"""
Every command and every snippet of README.md and docs/ works.

A fenced block without a mark is run, in a folder with a tiny data set and tiny models under the
names that the pages use. A block that needs a GPU, COCO, a download or SLURM says so in a comment
before it, `<!-- needs COCO -->`. It is not run: its options are parsed, its config is loaded with
the overrides, and its imports are resolved. A block with `<!-- client: sahi -->` is run if sahi is
installed, as by `make test-integrations`. `<!-- continues -->` says that a block of Python uses the
names of the one before.
"""

import ast
import configparser
import contextlib
import importlib
import importlib.util
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from torch.distributed.run import get_args_parser

import detectron2.model_zoo
from detectron2.config import LazyConfig
from detectron2.engine import DefaultTrainer

import msrcnn_d2
import msrcnn_d2_cli
from msrcnn_d2 import model_zoo
from msrcnn_d2.engine import find_config_file, load_config
from msrcnn_d2.modeling import CUES
from tests.helpers.pages import (
    CLIENT,
    CONTINUES,
    NEEDS,
    Block,
    blocks_of,
    commands_of,
    write_tiny_world,
)

ROOT = Path(__file__).resolve().parents[1]
# All pages, without what is installed or built
PAGES = [
    p
    for pattern in ("*.md", "[a-z]*/*.md", "[a-z]*/*/*.md")
    for p in sorted(ROOT.glob(pattern))
    if p.relative_to(ROOT).parts[0] != "output"
]
CALIBRATE = ROOT / "docs/calibrate.md"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STUDIES = [p for p in PAGES if p not in DOCS]  # they take minutes to hours
SCALING = ROOT / "docs" / "scaling.md"
# Nothing to run here: C++ needs a compiler, and tests/test_javascript.py runs JavaScript
DATA = ("text", "bibtex", "cpp", "js")
STAND_INS = {"PORT": "29500", "$SLURM_NNODES": "2"}  # for what the parser takes as a number


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_exist(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!\w+://)([^)#\s]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), f"{target}#{anchor}"
    assert "@@" not in text  # a gap that was to be filled


def anchors_of(page):
    """What a heading is called in links, by GitHub and by MyST."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings}


def test_there_are_pages():
    assert ROOT / "projects" / "nuclei" / "README.md" in STUDIES and SCALING in DOCS
    assert sum(len(blocks_of(page)) for page in DOCS) > 40


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_blocks_are_run_or_marked(page):
    """A typo in a mark, or a language that nothing runs, must not make a block a silent one."""
    for block in blocks_of(page):
        if block.language.startswith("{"):
            continue
        assert block.language in ("bash", "python", "yaml", *DATA), block
        is_mark = block.mark == CONTINUES or NEEDS.fullmatch(block.mark)
        assert not block.mark or is_mark or CLIENT.fullmatch(block.mark), block


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """A folder with a training's output, too, which pages about predictions start from."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_world(folder)
    return folder


@pytest.fixture
def world(tiny_world, tmp_path, monkeypatch, leave_no_traces):
    """A copy of it as the current directory, where published weights are those of a tiny model."""
    shutil.copytree(tiny_world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))  # PYTHONPATH=. of the pages
    find = model_zoo.get_config_file
    for zoo, weights in ((model_zoo, "published.pth"), (detectron2.model_zoo, "mask_rcnn.pth")):
        monkeypatch.setattr(zoo, "get_config", with_tiny_weights(zoo.get_config, weights))
    monkeypatch.setattr(
        model_zoo, "get_config_file", lambda name: name if os.path.exists(name) else find(name)
    )
    yield tmp_path
    for name, module in [*sys.modules.items()]:  # other pages may have others of the same name
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def with_tiny_weights(get_config, weights):
    config = "my_config.py" if weights == "published.pth" else "my_mask_rcnn.py"

    def get(name, trained=False):
        cfg = get_config(name, trained=False)
        if trained:
            cfg = LazyConfig.load(config)
            cfg.train.init_checkpoint = weights
        return cfg

    return get


PAGES_WITH_BLOCKS = [p for p in DOCS if any(not b.language.startswith("{") for b in blocks_of(p))]


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=name_of)
def test_page(page, world, monkeypatch):
    if page.name not in ("evaluate.md", "first_prediction.md"):  # one report shows that it works
        monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    names: dict = {}
    for block in blocks_of(page):
        with saying(block):
            if block.language == "bash":
                for command in commands_of_block(block):
                    check_command(command)
                    if not (NEEDS.match(block.mark) or lacks_client(block)):
                        run_command(command)
            elif block.language == "python":
                names = run_python(block, names if block.mark == CONTINUES else {})
            elif block.language == "yaml":
                yaml.safe_load(block.text)


@pytest.mark.parametrize("page", STUDIES, ids=name_of)
def test_commands_of_studies_are_accepted(page, world):
    for block in blocks_of(page):
        if block.language in ("", "bash"):
            with saying(block):
                for command in commands_of(block.text):
                    check_command(command)


def lacks_client(block: Block) -> bool:
    client = CLIENT.fullmatch(block.mark)
    spec = client and importlib.util.find_spec(client[1])
    # wandb's folder of runs could be imported, too, but has no __init__.py
    return client is not None and (spec is None or spec.origin is None)


@contextlib.contextmanager
def saying(block: Block):
    try:
        yield
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{block}: {error!r}\n{block.text}") from error


def commands_of_block(block: Block) -> list[list[str]]:
    """Of a script with its own control flow, those that start a training."""
    if not block.text.startswith("#!"):
        return list(commands_of(block.text))
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert checked.returncode == 0 and not checked.stderr
    lines = block.text.replace("\\\n", " ").splitlines()
    return [
        line[line.index(word) :].rstrip("'").replace('"', "").split()
        for line in lines
        for word in ("torchrun ", "msrcnn-d2 ")
        if word in line and not (word == "msrcnn-d2 " and "torchrun " in line)
    ]


def check_command(words: list[str]) -> None:
    """What a command says is there: program, options, files of the repository, config, keys."""
    program, *args = words
    if program == "torchrun":
        parsed = get_args_parser().parse_args([STAND_INS.get(x, x) for x in args])
        program = [] if parsed.no_python else ["python"]
        check_command([*program, parsed.training_script, *parsed.training_script_args])
    elif program == "msrcnn-d2" or (program == "python" and args[0] == "train_net.py"):
        command = args[0] if program == "msrcnn-d2" else "train"
        parsed = msrcnn_d2_cli.build_parser(command).parse(args[1:])
        if command == "evaluate" and msrcnn_d2_cli.evaluate.is_exported(parsed):
            msrcnn_d2_cli.evaluate.check_arguments(parsed)
        elif command in ("train", "evaluate") and not parsed.config_file.startswith("output/"):
            path = real_config(parsed.config_file)
            load_config(path, parsed.opts, parsed.retrofit, parsed.weights)
    elif program == "make":
        subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        check_installation(args)
    elif program == "python" and args[0].startswith(("projects/", "benchmarks/")):
        assert (ROOT / args[0]).is_file()
    else:
        assert program == "python" and Path(args[0]).is_file(), f"no test knows '{program}'"


def real_config(name: str) -> str:
    """Not the tiny one of the same name."""
    name = name.removeprefix("configs/")
    if (ROOT / "configs" / name).is_file():
        return str(ROOT / "configs" / name)
    if (ROOT / name).is_file():
        return str(ROOT / name)
    return find_config_file(name)


def check_installation(args: list[str]) -> None:
    """A folder of the repository with extras that it has, or packages that setup.cfg names."""
    command, *_, target = args
    assert command == "install"
    folder, _, extras = target.partition("[")
    setup = configparser.ConfigParser()
    if (ROOT / folder / "pyproject.toml").is_file():
        setup.read(ROOT / folder / "setup.cfg")
        for extra in filter(None, extras.rstrip("]").split(",")):
            assert extra in setup["options.extras_require"]
        return
    setup.read(ROOT / "setup.cfg")
    extra_packages = setup["options.extras_require"].values()
    known = "\n".join([setup["options"]["install_requires"], *extra_packages])
    names = {re.split("[^A-Za-z0-9._-]", line)[0] for line in known.splitlines()}
    assert {re.split("[<>=]", x)[0] for x in args[1:]} <= names


def run_command(words: list[str]) -> None:
    """In this process; what installs or takes minutes is not run, but checked above."""
    program, *args = words
    if program == "msrcnn-d2":
        if "output/" in " ".join(args) and not Path("output").exists():
            train_before()
        assert msrcnn_d2_cli.main(args) == 0
    elif program == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", args)
            runpy.run_path(args[0], run_name="__main__")
    else:
        assert program in ("make", "pip")


def train_before() -> None:
    """The run whose output a page refers to."""
    datasets = ["my_train", "train.json", "images/"], ["my_val", "val.json", "images/"]
    options = [word for dataset in datasets for word in ("--dataset", *dataset)]
    assert msrcnn_d2_cli.main(["train", "--config-file", "my_config.py", *options]) == 0


def run_python(block: Block, names: dict) -> dict:
    """The names that there are afterwards."""
    named = re.match(r"# (\w+\.py)\n", block.text)
    if named:
        Path(named[1]).write_text(block.text)
    if "output/" in block.text and not Path("output").exists():
        train_before()
    tree = ast.parse(block.text)
    if lacks_client(block):
        return names
    if NEEDS.match(block.mark):
        tree.body = [x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))]
    names.setdefault("__name__", "snippet")
    exec(compile(tree, str(block), "exec"), names)
    return names


def test_slurm_scripts_say_what_they_ask_for():
    scripts = [b.text for b in blocks_of(SCALING) if b.text.startswith("#!")]
    assert len(scripts) == 2
    for script in scripts:
        assert script.startswith("#!/bin/bash\n#SBATCH")
        assert sum(line.startswith("#SBATCH") for line in script.splitlines()) >= 5


def test_the_table_of_batch_sizes_is_what_detectron2_makes_of_the_recipe():
    config = "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.yaml"
    cfg = load_config(find_config_file(config), ["SOLVER.REFERENCE_WORLD_SIZE=8"])
    rows = re.findall(r"^\| (\d+)[^|]*((?:\| [\d., ]+){5})\|$", SCALING.read_text(), re.MULTILINE)
    assert [int(n) for n, _ in rows] == [1, 4, 8, 32]
    for num_processes, row in rows:
        solver = DefaultTrainer.auto_scale_workers(cfg, int(num_processes)).SOLVER
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        assert cells == [
            f"{solver.IMS_PER_BATCH}",
            f"{solver.BASE_LR:g}",
            f"{solver.MAX_ITER:,}",
            ", ".join(f"{step:,}" for step in solver.STEPS),
            f"{solver.WARMUP_ITERS:,}",
        ]


# Values of the keys of docs/options.md whose default is no number
VALUES = {
    "dataloader.images.intensity_range": "[0,4095]",
    "dataloader.images.intensity_percentiles": "[0.1,99.9]",
    "dataloader.images.max_pixels": "1000",
    "dataloader.keypoints.names": "['left_eye','right_eye']",
    "dataloader.keypoints.flip_map": "[['left_eye','right_eye']]",
    "dataloader.evaluator.kpt_oks_sigmas": "[0.05,0.1]",
    "dataloader.evaluator.engine": "pycocotools",
    "dataloader.evaluator.max_dets_per_image": "200",
    "train.freeze": "['backbone']",
    "train.model_ema.device": "cpu",
    "train.reference_batch_size": "16",
    "train.hooks": "['my_module.MyHook']",
    "train.writers": "['my_module.MyWriter']",
}


@pytest.mark.parametrize("column", [0, 1], ids=["lazy", "yaml"])
def test_options_are_keys_of_both_kinds_of_config(column):
    """The page that maps them: each key is known, and has the default that the page says."""
    key_of = r"(?:`([\w.]+)`|\(none\))"
    row = re.compile(rf"^\| {key_of}<br>{key_of} \| (.*?) \|", re.MULTILINE)
    rows = row.findall((ROOT / "docs" / "options.md").read_text())
    assert len(rows) > 30 and set(VALUES) <= {row[0] for row in rows}
    path = find_config_file(
        f"COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x{('.py', '.yaml')[column]}"
    )
    cfg = load_config(path)
    overrides = []
    for *keys, default in rows:
        key = keys[column]
        if key and re.fullmatch(r"-?[\d.]+|True|False", default):
            assert str(value_of(cfg, key, default)) == default, key
            overrides.append(f"{key}={default}")
        elif key:
            overrides.append(f"{key}={VALUES.get(keys[0], value_of(cfg, key, None))}")
    load_config(path, [x for x in overrides if "intensity_percentiles" not in x.lower()])
    load_config(path, [x for x in overrides if "intensity_range" not in x.lower()])


def value_of(cfg, key, default):
    """An argument that a LazyConfig leaves at its default is not in it."""
    for name in key.split("."):
        if name not in cfg:
            return default
        cfg = cfg[name]
    return cfg


def test_the_page_on_calibration_lists_all_cues():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", CALIBRATE.read_text(), re.M)
    cues = [(name, cue.meaning, cue.unit, cue.source) for name, cue in CUES.items()]
    assert [row for row in rows if row[0] in CUES] == cues


def test_roles_in_docstrings_name_what_there_is():
    """`make docs` resolves those that it shows; here are all, of internal modules as well."""
    names = [x.name for x in pkgutil.walk_packages(msrcnn_d2.__path__, "msrcnn_d2.")]
    ours = [importlib.import_module(x) for x in names if ".configs" not in x]
    parts = "modeling modeling.roi_heads structures engine data evaluation checkpoint config layers"
    theirs = [importlib.import_module(f"detectron2.{x}") for x in parts.split()]
    theirs.append(importlib.import_module("detectron2.utils.visualizer"))
    wrong = []
    for module in ours:
        classes = [x for x in vars(module).values() if isinstance(x, type)]
        text = Path(module.__file__).read_text()
        for name in re.findall(r":(?:class|func|meth|attr|mod|exc|data):`~?\.?([^`]+)`", text):
            is_module = any(x == name or x.endswith(f".{name}") for x in names)
            if not is_module and not any(has(x, name) for x in (*classes, *ours, *theirs)):
                wrong.append(f"{module.__name__}: {name}")
    assert not wrong


def has(scope, dotted_name):
    for name in dotted_name.split("."):
        if name in getattr(scope, "__annotations__", ()):  # a field of a dataclass
            return True
        if not hasattr(scope, name):
            return False
        scope = getattr(scope, name)
    return True
