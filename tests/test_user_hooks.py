"""Hooks and writers of the user's own, in both kinds of config."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from detectron2.config import CfgNode, LazyCall, LazyConfig
from detectron2.utils.events import EventStorage

from msrcnn_d2 import model_zoo
from msrcnn_d2.engine import build_recipe, load_config
from msrcnn_d2.engine.user_hooks import build_hooks, build_writers, check_hooks_and_writers
from msrcnn_d2.utils.errors import UserError
from tests.helpers import forked
from tests.helpers.command import exit_code
from tests.helpers.recording import RecordingHook, RecordingWriter, recorded
from tests.helpers.toy import tiny_yacs_config
from tests.helpers.toy_training import lazy_config, run, write_dataset

pytestmark = pytest.mark.usefixtures("leave_no_traces")

LAZY = model_zoo.get_config_file("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py")
YACS = LAZY.replace(".py", ".yaml")
HERE = "tests.helpers.recording"


@pytest.fixture(scope="module")
def toy_dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("toy"))


def write_config(kind: str, folder: Path, **writer) -> list[str]:
    """
    A training of four iterations, evaluated after each second, with a hook and a writer.

    Returns:
        the options that name it and its output folder.
    """
    hook, writer_file = str(folder / "hook.txt"), str(folder / "writer.txt")
    path = folder / "my_config.yaml"
    if kind == "lazy":
        cfg = lazy_config()
        cfg.train.update(max_iter=4, eval_period=2)
        cfg.train.checkpointer.period = 2
        cfg.train.hooks = [LazyCall(RecordingHook)(path=hook)]
        cfg.train.writers = [LazyCall(RecordingWriter)(path=writer_file, **writer)]
        LazyConfig.save(cfg, str(path))
        return ["--config-file", str(path), f"train.output_dir={folder / 'output'}"]
    cfg = tiny_yacs_config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("toy",)
    cfg.SOLVER.merge_from_other_cfg(
        CfgNode(
            {
                "IMS_PER_BATCH": 2,
                "MAX_ITER": 4,
                "STEPS": (),
                "BASE_LR": 1e-3,
                "CHECKPOINT_PERIOD": 2,
            }
        )
    )
    cfg.TEST.EVAL_PERIOD = 2
    cfg.SEED = 1  # as in lazy_config: some random weights find nothing, which has no AP
    cfg.DATALOADER.NUM_WORKERS = 0
    content = yaml.safe_load(cfg.dump())
    content["SOLVER"]["HOOKS"] = [{"_target_": f"{HERE}.RecordingHook", "path": hook}]
    content["SOLVER"]["WRITERS"] = [
        {"_target_": f"{HERE}.RecordingWriter", "path": writer_file, **writer}
    ]
    path.write_text(yaml.safe_dump(content))
    return ["--config-file", str(path), f"OUTPUT_DIR={folder / 'output'}"]


# In a yaml config metrics are written every 20 iterations, after each evaluation and at the end
@pytest.mark.parametrize("kind, writes", [("lazy", [0, 1, 2, 3, 4]), ("yacs", [1, 3, 4])])
def test_they_see_results_and_metrics_and_a_resumed_run_has_them(
    kind, writes, toy_dataset, tmp_path
):
    options = write_config(kind, tmp_path)
    run(*options, *toy_dataset)
    steps = [[0, k, k == 1] for k in range(4)]  # the last evaluation is after the last step
    assert recorded(tmp_path / "hook.txt") == [*steps, [0, "end", True]]
    # What hooks log is written in the same iteration
    written = [[0, k, 10 * min(k, 3)] for k in writes]
    assert recorded(tmp_path / "writer.txt") == [*written, ["closed"]]
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    logged = {x["iteration"]: x.get("recorded/ten_times") for x in map(json.loads, lines)}
    assert logged[1] == 10 and logged[3] == 30

    # With the config that the run has saved
    for name in ("hook.txt", "writer.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    saved = str(tmp_path / "output" / "config.yaml")
    run("--config-file", saved, *options[2:], *toy_dataset, "--resume")
    assert recorded(tmp_path / "hook.txt") == [*steps[2:], [0, "end", True]]
    assert recorded(tmp_path / "writer.txt") == [*(x for x in written if x[1] > 1), ["closed"]]

    # An evaluation does not need them, and their module may be missing there
    cfg = Path(saved).read_text().replace(HERE, "no_such_module")
    (tmp_path / "elsewhere.yaml").write_text(cfg)
    other = ["--config-file", tmp_path / "elsewhere.yaml", *options[2:], *toy_dataset]
    assert exit_code("evaluate", "--resume", *other) == 0


@pytest.mark.parametrize(
    "entries, told",
    [
        ("[no_such_module.MyHook]", "no module 'no_such_module'"),
        (f"[{HERE}.RecordingHok]", "did you mean RecordingHook"),
        (f"[{HERE}.RecordingWriter]", "derive it from detectron2.engine.HookBase"),
        ("[my_broken_module.MyHook]", "No module named 'a_missing_client'"),
        (f"[{{_target_: {HERE}.RecordingHook, pth: x}}]", "RecordingHook(path: str"),
        (f"[{HERE}.FailingHook]", "missing a required argument: 'number'"),
    ],
)
@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_a_mistake_in_an_entry_is_told_before_training(kind, entries, told, tmp_path, monkeypatch):
    (tmp_path / "my_broken_module.py").write_text("import a_missing_client")
    monkeypatch.syspath_prepend(str(tmp_path))
    override = f"train.hooks={entries}"
    if kind == "yacs":
        override = f"SOLVER.HOOKS={yaml.safe_load(entries)}"
    recipe = build_recipe(load_config({"lazy": LAZY, "yacs": YACS}[kind], [override]))
    with pytest.raises(UserError) as error:
        check_hooks_and_writers(recipe)
    assert told in str(error.value) and "train.hooks (yaml: SOLVER.HOOKS)" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path, override",
    [
        (LAZY, f"train.writers={HERE}.RecordingWriter"),
        (LAZY, "train.writers=[RecordingWriter]"),
        (LAZY, "train.writers=[3]"),
        (LAZY, "train.writers=[{path: x}]"),
        (YACS, "SOLVER.WRITERS=['RecordingWriter']"),
        (YACS, "SOLVER.WRITERS=[{'path': 'x'}]"),
    ],
)
def test_what_is_no_list_of_names_is_refused(path, override):
    with pytest.raises(UserError, match="WRITERS.*takes a list of dotted names"):
        load_config(path, [override])


def test_a_typo_ends_the_command_in_one_sentence(toy_dataset, tmp_path, capsys):
    options = write_config("lazy", tmp_path)
    assert exit_code("train", *options, *toy_dataset, f"train.writers=[{HERE}.Recording]") == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "RecordingWriter" in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not (tmp_path / "hook.txt").exists() and not (tmp_path / "writer.txt").exists()


def test_what_fails_while_it_is_built_is_told_with_its_line():
    override = f"train.hooks=[{{_target_: {HERE}.FailingHook, number: 3}}]"
    recipe = build_recipe(load_config(LAZY, [override]))
    check_hooks_and_writers(recipe)
    with pytest.raises(UserError, match=r"ValueError: 3 is \('.*recording.py', line \d+\)\."):
        build_hooks(recipe)
    recipe = build_recipe(load_config(LAZY, [f"train.hooks=[{HERE}.no_hook]"]))
    check_hooks_and_writers(recipe)
    with pytest.raises(UserError, match="no_hook makes no HookBase"):
        build_hooks(recipe)


def test_a_writer_is_closed_if_the_next_one_cannot_be_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = f"[{HERE}.RecordingWriter,{HERE}.no_hook]"
    recipe = build_recipe(load_config(LAZY, [f"train.writers={entries}"]))
    with pytest.raises(UserError, match="no_hook makes no EventWriter"):
        build_writers(recipe)
    assert recorded("writer.txt") == [["closed"]]


# ---- writers that fail


def writers_of(folder, *fails_at):
    """The hook that calls a writer after each iteration, and what stands for its trainer."""
    recipe = SimpleNamespace(log_period=1, eval_period=0)
    writer = {"path": str(folder / "writer.txt"), "fails_at": fails_at}
    recipe.writers = [{"_target_": f"{HERE}.RecordingWriter", **writer}]
    hook = build_writers(recipe)
    hook.trainer = SimpleNamespace(iter=0, max_iter=100)
    return hook


def test_a_writer_that_never_works_ends_the_training(toy_dataset, tmp_path, capsys):
    options = write_config("lazy", tmp_path, fails_at=[0])
    assert exit_code("train", *options, *toy_dataset) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "RecordingWriter" in captured.err
    assert "ConnectionError: the server is down (" in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert recorded(tmp_path / "writer.txt") == [[0, 0, 0], ["closed"]]


def test_a_writer_that_fails_later_gets_a_warning_and_is_called_again(tmp_path, caplog):
    hook = writers_of(tmp_path, 1, 2, 5, "close")
    told = []
    with EventStorage() as storage:
        for iteration in range(5):
            storage.iter = hook.trainer.iter = iteration
            hook.after_step()
            told.append(len(caplog.records))
        storage.iter = 5
        hook.after_train()
    assert told == [0, 1, 1, 2, 2]  # once when it fails, and when it works again
    last, closing = [x.getMessage() for x in caplog.records[2:]]
    assert "last metrics" in last and "cannot be closed" in closing
    assert [x[1] for x in recorded(tmp_path / "writer.txt")[:-1]] == [0, 1, 2, 3, 4, 5]


def test_the_end_of_a_training_that_has_failed_hides_no_error(tmp_path, caplog):
    hook = writers_of(tmp_path, 0)
    with EventStorage():
        hook.after_train()  # the iteration has failed before it was written
    assert "the server is down" in caplog.text
    assert recorded(tmp_path / "writer.txt") == [[0, 0, None], ["closed"]]


# ---- several processes


def test_of_two_processes_both_have_the_hooks_and_one_has_the_writers(toy_dataset, tmp_path):
    options = write_config("lazy", tmp_path)
    spawn = ["--num-gpus", "2", "--dist-url", "auto", "train.max_iter=2"]
    log = tmp_path / "log.txt"
    process = forked.start(forked.train, *options, *spawn, *toy_dataset, log=log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-4000:]
    ranks = [x[0] for x in recorded(tmp_path / "hook.txt")]
    assert sorted(ranks) == [0, 0, 0, 1, 1, 1]
    assert [x[0] for x in recorded(tmp_path / "writer.txt")] == [0, 0, 0, "closed"]
