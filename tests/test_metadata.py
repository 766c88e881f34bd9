"""Files that state the same facts about the project agree with each other."""

import configparser
import re
from pathlib import Path

import yaml

import msrcnn_d2

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version_is_the_same_everywhere():
    assert read_yaml("CITATION.cff")["version"] == msrcnn_d2.__version__
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased" and versions[1] == msrcnn_d2.__version__


def test_ci_runs_on_each_python_that_is_supported():
    classifiers = SETUP["metadata"]["classifiers"]
    supported = re.findall(r"Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    job = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == supported
    assert {"run": ".ci/run"} in job["steps"]
    assert SETUP["options"]["python_requires"] == f">={supported[0]}"
    assert f"| Python | {supported[0]} to {supported[-1]} |" in (ROOT / "README.md").read_text()


def test_hooks_before_a_commit_are_those_of_make_lint():
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    commands = re.findall(r"^\t\$\(BIN\)/(.+)$", recipe, re.MULTILINE)
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    assert hooks == commands and len(commands) == 3


def test_the_paper_is_cited_in_the_same_way():
    paper = read_yaml("CITATION.cff")["preferred-citation"]
    authors = " and ".join(f"{x['family-names']}, {x['given-names']}" for x in paper["authors"])
    readme = (ROOT / "README.md").read_text()
    assert authors in readme and paper["url"] in readme
    assert f"year      = {{{paper['year']}}}" in readme
