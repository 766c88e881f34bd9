"""The command `msrcnn-d2`: what it accepts, what it says, and how little it imports to say it."""

import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from detectron2.engine import default_argument_parser

from msrcnn_d2 import published_models
from msrcnn_d2.checkpoint.fetching import path_in_cache
from msrcnn_d2.checkpoint.writing import WRITERS
from msrcnn_d2.evaluation import average_precision
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_cli import COMMANDS, build_parser, parsing
from msrcnn_d2_cli.train import read_config
from tests.helpers.command import exit_code

ROOT = Path(__file__).parents[1]
LAZY = "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py"
YACS = LAZY.replace(".py", ".yaml")


def run_alone(*args, **options):
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT, **options
    )


def examples_of(name):
    """The arguments of each command in the examples of --help."""
    text = import_module(f"msrcnn_d2_cli.{name.replace('-', '_')}").EXAMPLES
    for line in text.replace("\\\n", " ").replace("{prog}", f"msrcnn-d2 {name}").splitlines():
        _, found, command = line.partition("msrcnn-d2 ")
        # Not the names of commands in the explanations
        if found and line.startswith("    "):
            yield shlex.split(command)


# ---- help


def test_neither_help_nor_a_typo_imports_anything_heavy():
    calls = [["--help"], ["--version"], [], ["trian"], ["train", "--reusme"], ["zoo", "a", "b"]]
    calls += [[name, "--help"] for name in COMMANDS]
    calls += [["check-data", "a.json"], ["train", "--num-gpus", "two"]]
    code = f"""
import sys
from msrcnn_d2_cli import main
for call in {calls}:
    try:
        main(call)
    except SystemExit:
        pass
print("imported:", {{"msrcnn_d2", "torch", "detectron2", "numpy", "PIL"}} & set(sys.modules))
"""
    ran = run_alone("-c", code)
    assert ran.returncode == 0 and ran.stdout.endswith("imported: set()\n"), ran.stdout + ran.stderr


def test_help_lists_the_commands(capsys):
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", shown, re.MULTILINE)
    assert exit_code() == 2
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    assert exit_code(name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: msrcnn-d2 {name} ") and "{prog}" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    calls = list(examples_of(name))
    assert [x[0] for x in calls].count(name) >= 2 or name == "zoo"
    for example, *arguments in calls:
        build_parser(example).parse(arguments)


def test_help_says_what_the_library_has():
    assert parsing.ENGINES == average_precision.ENGINES
    assert ", ".join(WRITERS) in build_parser("convert").format_help()


def test_version(capsys):
    assert exit_code("--version") == 0
    assert re.fullmatch(r"msrcnn-d2 \d+\.\d+\.\d+\n", capsys.readouterr().out)


# ---- what is accepted


def test_detectron2s_options_have_its_names_and_defaults():
    theirs = vars(default_argument_parser().parse_args([]))
    ours = vars(build_parser("train").parse([]))
    assert ours == {**ours, **theirs, "opts": []} and theirs.keys() < ours.keys()
    del ours["scale_lr"]  # which is for a training
    assert vars(build_parser("evaluate").parse([])) == {**ours, "eval_only": True}


@pytest.mark.parametrize(
    "line, num_gpus, opts",
    [
        ("--num-gpus 2 a.b=c d=e", 2, "a.b=c d=e"),
        ("a.b=c --num-gpus 2 d=e", 2, "a.b=c d=e"),
        ("a.b=c d=e --num-gpus=2", 2, "a.b=c d=e"),
        ("A.B C --num-gpus 2 D E", 2, "A.B C D E"),
        ("--num-gpus 2 -- a.b=c", 2, "a.b=c"),
        ("A.B -1 A.C -1e-3 A.D -.5 A.E -inf a=-1", 1, "A.B -1 A.C -1e-3 A.D -.5 A.E -inf a=-1"),
        ("A.B (-1,2) A.C [-1]", 1, "A.B (-1,2) A.C [-1]"),
        ("", 1, ""),
    ],
)
def test_options_stand_anywhere_among_keys_and_values(line, num_gpus, opts):
    args = build_parser("train").parse(line.split())
    assert (args.num_gpus, args.opts) == (num_gpus, opts.split())


def test_options_stand_anywhere_among_files():
    for line in ("--quick a.json b", "a.json --quick b", "a.json b --quick"):
        args = build_parser("check-data").parse(line.split())
        assert (args.quick, args.annotations, str(args.images)) == (True, "a.json", "b")


@pytest.mark.parametrize("config, key", [(LAZY, "train.init_checkpoint"), (YACS, "MODEL.WEIGHTS")])
def test_weights_are_those_of_either_kind_of_config(config, key):
    def weights(*options):
        args = build_parser("evaluate").parse(["--config-file", config, *options])
        cfg = read_config(args)
        return cfg.MODEL.WEIGHTS if config == YACS else cfg.train.init_checkpoint

    assert weights("--weights", "a=b, 'c'.pth") == "a=b, 'c'.pth"
    assert weights(f"{key}=other.pth", "--weights", "model.pth") == "other.pth"
    assert weights().endswith("R-50.pkl")


def test_a_retrofit_takes_its_weights_as_an_option():
    config = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
    options = ["--retrofit", "--config-file", config]
    args = build_parser("train").parse([*options, "--weights", "model.pth"])
    assert read_config(args).train.init_checkpoint == "model.pth"
    with pytest.raises(UserError, match="no trained Mask R-CNN"):
        read_config(build_parser("train").parse([*options, "--weights", ""]))


# ---- mistakes


@pytest.mark.parametrize(
    "args, said",
    [
        (["trian"], "did you mean 'train'?"),
        (["checkdata", "a.json"], "did you mean 'check-data'?"),
        (["xyz"], "check-data"),
        (["--resume", "train"], "COMMAND --resume train"),
        (["train", "--num-gpu", "2"], "did you mean --num-gpus?"),
        (["train", "a=b", "--reusme", "c=d"], "did you mean --resume?"),
        (["train", "--config-fil=x"], "'--config-fil'; did you mean --config-file?"),
        (["train", "-x"], "'-x'"),
        (["train", "--num-gpus", "two"], "--num-gpus"),
        (["train", "--dataset", "name", "a.json"], "--dataset"),
        (["evaluate", "--eval-onli"], "'--eval-onli'"),
        (["convert", "in.pth"], "OUT"),
        (["check-data", "a.json", "images", "more"], "'more'"),
        (["check-data", "a.json"], "--no-images"),
        (["check-data", "a.json", "b", "--workers", "0"], "at least 1, not '0'"),
        (["check-data", "a.json", "b", "--show", "few"], "at least 0, not 'few'"),
        (["report", "a.json", "b.json", "--engine", "x"], "faster-coco-eval"),
        (["zoo", "name", "--markdown"], "not both"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(args, said, capsys):
    assert exit_code(*args) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and said in printed.err


def test_without_detectron2_it_says_how_to_get_it():
    code = "import sys; sys.modules['detectron2'] = None; from msrcnn_d2_cli import main; "
    ran = run_alone("-c", code + "main(['zoo'])")
    assert ran.returncode == 2 and ran.stdout == ""
    assert "pip install" in ran.stderr and "Traceback" not in ran.stderr


# ---- the script, and the shell


def test_train_net_is_train():
    ran = run_alone("train_net.py", "--help", env={**os.environ, "COLUMNS": "80"})
    assert ran.returncode == 0
    help_of_train = run_alone(
        *("-m", "msrcnn_d2_cli", "train", "--help"), env={**os.environ, "COLUMNS": "80"}
    ).stdout
    # torchrun starts a script as it is, and another command with --no-python
    expected = help_of_train.replace("--no-python ", "").replace("msrcnn-d2 train", "train_net.py")
    assert ran.stdout == expected
    assert run_alone("train_net.py", "--reusme").returncode == 2


def completions(line, tmp_path):
    out = tmp_path / "completions"
    env = {**os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    env.update(COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE_IFS=" ")
    run_alone("-m", "msrcnn_d2_cli", env=env)
    return out.read_text().split()


def test_the_shell_completes_commands_and_options(tmp_path):
    pytest.importorskip("argcomplete")
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / "msrcnn_d2_cli" / "__init__.py").read_text()[:1024]
    assert completions("msrcnn-d2 check", tmp_path) == ["check-data"]
    assert completions("msrcnn-d2 train --num-g", tmp_path) == ["--num-gpus"]


# ---- zoo


def test_zoo_lists_all_models_and_what_was_published(capsys):
    assert exit_code("zoo") == 0
    rows = dict(re.findall(r"^(ms_rcnn_\S+) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert len(rows) == 8
    for name, row in rows.items():
        published = published_models.PUBLISHED.get(name)
        assert ("published" in row) is (published is not None)
        if published:
            assert row.split()[2:4] == [f"{published.box_ap:.1f}", f"{published.mask_ap:.1f}"]
    assert rows["ms_rcnn_X_101_32x4d_FPN_1x"].split() == ["X-101-32x4d-FPN", "1x"]


@pytest.mark.parametrize("name", ["ms_rcnn_R_50_FPN_1x", LAZY, YACS])
def test_zoo_tells_where_a_model_is(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    url = published_models.PUBLISHED["ms_rcnn_R_50_FPN_1x"].checkpoint_url
    kept = Path(path_in_cache(url))
    for state in ("not downloaded yet", "downloaded"):
        assert exit_code("zoo", name) == 0
        lines = [x.split(None, 1) for x in capsys.readouterr().out.splitlines()]
        configs = [Path(text) for kind, text in lines if kind == "config"]
        assert [x.suffix for x in configs] == [".py", ".yaml"] and all(x.is_file() for x in configs)
        assert lines[2:] == [["weights", url], ["file", f"{kept} ({state})"]]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()


def test_zoo_as_markdown_and_of_models_without_weights(capsys):
    assert exit_code("zoo", "--markdown") == 0
    assert capsys.readouterr().out == published_models.published_table() + "\n"
    assert exit_code("zoo", "ms_rcnn_X_101_32x4d_FPN_1x") == 0
    assert "none are published" in capsys.readouterr().out
    assert exit_code("zoo", "ms_rcnn_R50_FPN_1x") == 2
    assert "ms_rcnn_R_50_FPN_1x" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "msrcnn_d2_cli", "zoo"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert ran.returncode == 128 + signal.SIGPIPE and "Traceback" not in ran.stderr
