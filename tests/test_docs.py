"""What the READMEs and docs/ refer to is there, and the commands of docs/ are accepted."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from detectron2.engine import DefaultTrainer

from msrcnn_d2.engine import find_config_file, load_config
from msrcnn_d2_cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [p for depth in ("*", "*/*", "*/*/*") for p in sorted(ROOT.glob(f"{depth}.md"))]
DOCS = sorted((ROOT / "docs").glob("*.md"))
SCALING = ROOT / "docs" / "scaling.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_images_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
    assert "@@" not in text  # a gap that was to be filled


def test_there_are_pages():
    assert ROOT / "README.md" in PAGES and ROOT / "projects" / "nuclei" / "README.md" in PAGES
    assert SCALING in PAGES


def blocks(page: Path, language: str) -> list[str]:
    """Text of the fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands_of_train_net(text: str) -> list[list[str]]:
    """The arguments that come after train_net.py, of each command."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(arguments.rstrip("'"))
        for _, found, arguments in (line.partition("train_net.py ") for line in lines)
        if found
    ]


def commands_of_docs():
    for page in DOCS:
        for language in ("", "bash"):
            for block in blocks(page, language):
                for arguments in commands_of_train_net(block):
                    yield pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)}")


@pytest.mark.parametrize("arguments", commands_of_docs())
def test_commands_are_accepted(arguments):
    args = build_parser("train").parse(arguments)
    load_config(find_config_file(str(ROOT / args.config_file)), args.opts)


@pytest.mark.parametrize("script", blocks(SCALING, "bash"), ids=["torchrun", "pre-emption"])
def test_scripts_are_bash(script):
    checked = subprocess.run(
        ["bash", "-n"], input=script, text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0 and not checked.stderr
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(options) >= 5 and script.startswith("#!/bin/bash\n#SBATCH")


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
