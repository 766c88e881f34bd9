"""Values on the command line and in config files: what is taken, and what is refused."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from msrcnn_d2 import add_msrcnn_config, model_zoo, retrofit
from msrcnn_d2.engine import launch as launch_module
from msrcnn_d2.engine import load_config
from msrcnn_d2.engine import loop as loop_module
from msrcnn_d2.engine.configs import ABSENT, SETTINGS, _known_keys, check_values, find
from msrcnn_d2.engine.preflight import _check_paths
from msrcnn_d2.utils.errors import UserError
from tests.helpers.toy_training import run, write_dataset, write_lazy_config

NAME = "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x"
LAZY = model_zoo.get_config_file(NAME + ".py")
YACS = LAZY.replace(".py", ".yaml")

pytestmark = pytest.mark.usefixtures("leave_no_traces")


@pytest.mark.parametrize(
    "path",
    [
        *["a=b", "a,b", "it's", "two words", "(x)", "[x]", "{x}", "#1", "größe/图", "a: b"],
        *["epoch=3.safetensors", "s3://b/k?x=1", "1e5", "3", "True", "back\\slash", "'", '"a'],
    ],
)
def test_paths_are_taken_as_they_are(path):
    keys = ["train.output_dir", "train.init_checkpoint", "dataloader.evaluator.output_dir"]
    cfg = load_config(LAZY, [f"{key}={path}" for key in keys])
    assert (cfg.train.output_dir, cfg.train.init_checkpoint) == (path, path)
    assert cfg.dataloader.evaluator.output_dir == path
    cfg = load_config(YACS, [f"OUTPUT_DIR={path}", "MODEL.WEIGHTS", path])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == (path, path)


def test_quotes_of_hydra_and_of_yacs_still_work():
    cfg = load_config(LAZY, ["train.output_dir='a b'", 'train.init_checkpoint="x=1"'])
    assert (cfg.train.output_dir, cfg.train.init_checkpoint) == ("a b", "x=1")
    assert load_config(YACS, ["OUTPUT_DIR='a b'"]).OUTPUT_DIR == "a b"


def test_a_value_has_the_type_of_its_key():
    cfg = load_config(
        LAZY,
        [
            *["optimizer.lr=1", "train.max_iter=100", "train.amp.enabled=true"],
            *["dataloader.train.dataset.names=[a,b]", "dataloader.test.dataset.names=1e5"],
        ],
    )
    assert isinstance(cfg.optimizer.lr, float) and cfg.optimizer.lr == 1
    assert isinstance(cfg.train.max_iter, int) and cfg.train.amp.enabled is True
    assert cfg.dataloader.train.dataset.names == ["a", "b"]
    assert cfg.dataloader.evaluator.dataset_name == "1e5"
    assert load_config(LAZY, ["optimizer.lr=1e5"]).optimizer.lr == 1e5
    cfg = load_config(YACS, ["SOLVER.BASE_LR", "1", "SOLVER.STEPS", "(3,4)"])
    assert isinstance(cfg.SOLVER.BASE_LR, float) and cfg.SOLVER.STEPS == (3, 4)


@pytest.mark.parametrize(
    "lazy, yaml, values",
    [
        ("train.max_iter", "SOLVER.MAX_ITER", ["0", "-1", "1e1", "2.0", "2.5", "nan", "x"]),
        ("train.eval_period", "TEST.EVAL_PERIOD", ["-1", "nan"]),
        ("train.log_period", None, ["0", "1e1"]),
        ("train.checkpointer.period", "SOLVER.CHECKPOINT_PERIOD", ["0", "-5"]),
        ("train.checkpointer.max_to_keep", None, ["0", "-1"]),
        ("train.seed", "SEED", ["1e1", str(2**32), "nan"]),
        ("train.amp.enabled", "SOLVER.AMP.ENABLED", ["no", "2"]),
        ("train.output_dir", "OUTPUT_DIR", [""]),
        ("dataloader.train.total_batch_size", "SOLVER.IMS_PER_BATCH", ["0", "-2", "nan"]),
        ("dataloader.train.num_workers", "DATALOADER.NUM_WORKERS", ["-1", "1.5"]),
        ("dataloader.test.batch_size", "DATALOADER.TEST_BATCH_SIZE", ["0", "-1"]),
        ("model.roi_heads.num_classes", "MODEL.ROI_HEADS.NUM_CLASSES", ["'4'", "0", "-1"]),
        ("optimizer.lr", "SOLVER.BASE_LR", ["0,001", "nan", "inf", "-1"]),
        ("lr_multiplier.warmup_length", "SOLVER.WARMUP_ITERS", ["-1", "nan"]),
    ],
)
def test_a_value_that_makes_no_training_is_refused(lazy, yaml, values):
    for path, key in ((LAZY, lazy), (YACS, yaml)):
        for value in values if key else []:
            with pytest.raises(UserError) as error:
                load_config(path, [f"{key}={value}"])
            assert key in str(error.value) and "\n" not in str(error.value)


def test_the_same_values_are_refused_in_a_file(tmp_path):
    base = f"from detectron2.config import LazyConfig\ncfg = LazyConfig.load({LAZY!r})\n"
    base += "model, dataloader, train = cfg.model, cfg.dataloader, cfg.train\n"
    base += "optimizer, lr_multiplier = cfg.optimizer, cfg.lr_multiplier\n"
    path = tmp_path / "config.py"
    for line in ("train.max_iter = 9e4", "train.max_iter = None", "train.seed = '1'"):
        path.write_text(base + line)
        with pytest.raises(UserError, match=line.split()[0]):
            load_config(str(path))
    path = tmp_path / "config.yaml"
    path.write_text(f"_BASE_: {YACS}\nSOLVER:\n  IMS_PER_BATCH: 0\n")
    with pytest.raises(UserError, match="IMS_PER_BATCH"):
        load_config(str(path))


SCORING = f"""
from detectron2.config import LazyConfig
cfg = LazyConfig.load({LAZY!r})
model, dataloader, train = cfg.model, cfg.dataloader, cfg.train
optimizer, lr_multiplier = cfg.optimizer, cfg.lr_multiplier
model.roi_heads.mask_iou_head.score_exponent = """
SAVED = f"_BASE_: {YACS}\nMODEL:\n  ROI_MASK_IOU_HEAD:\n    SCORE_EXPONENT: "


@pytest.mark.parametrize(
    "suffix, text, values",
    [("py", SCORING, ["None", "1", "1.0", "4.0"]), ("yaml", SAVED, ["null", "1", "1.0", "4.0"])],
)
def test_the_exponent_of_older_configs_may_only_be_1(suffix, text, values, tmp_path):
    path = tmp_path / f"config.{suffix}"
    *without_effect, other = values
    for value in without_effect:
        path.write_text(text + value)
        cfg = load_config(str(path))
        if suffix == "py":
            assert cfg.model == load_config(LAZY).model
        else:
            assert cfg == load_config(YACS)
    path.write_text(text + other)
    with pytest.raises(UserError, match="score_exponent is 4.0"):
        load_config(str(path))


def test_programs_of_users_read_yaml_configs_with_an_exponent(tmp_path):
    (tmp_path / "config.yaml").write_text(SAVED + "null")
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    add_msrcnn_config(cfg)  # twice does no harm
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    assert cfg == model_zoo.get_config(NAME + ".yaml")


def test_the_exponent_is_no_option():
    with pytest.raises(UserError, match="MODEL.ROI_MASK_IOU_HEAD.SCORE_EXPONENT"):
        load_config(YACS, ["MODEL.ROI_MASK_IOU_HEAD.SCORE_EXPONENT", "2.0"])
    with pytest.raises(UserError, match="score_exponent"):
        load_config(LAZY, ["model.roi_heads.mask_iou_head.score_exponent=2.0"])


def test_each_setting_names_keys_that_exist():
    lazy, yacs = load_config(LAZY), load_config(YACS)
    # The model of a retrofitted Panoptic FPN has all keys
    panoptic = detectron2_zoo.get_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py")
    lazy.model = retrofit(panoptic).model
    check_values(lazy)
    check_values(yacs)
    for setting in SETTINGS:
        if setting.yaml:
            value = find(yacs, setting.yaml)
            assert value is not ABSENT
            assert setting.holds is None or setting.holds(value)
        if setting.holds:
            assert not setting.holds(math.nan) and not setting.holds([math.nan])
        parent, _, name = (setting.lazy or "train.").rpartition(".")
        node = find(lazy, parent)
        assert node is not ABSENT and (name in ("", *_known_keys(node)[0]))


@pytest.mark.parametrize(
    "line, words",
    [
        ("raise ValueError('the third fold is empty')", "the third fold is empty"),
        ("{}['fold']", "KeyError"),
        ("train.nosuch.key = 1", "Attribute"),
        ("int.nosuch", "nosuch"),
        ("open('nosuch.txt')", "nosuch.txt"),
        ("from msrcnn_d2 import model_zoo; model_zoo.get_config_file('nosuch')", "nosuch"),
    ],
)
def test_an_error_of_a_config_file_is_its_own_sentence_and_line(line, words, tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(f"from omegaconf import DictConfig\ntrain = DictConfig({{}})\n{line}\n")
    with pytest.raises(SystemExit) as left:
        run("--config-file", path)
    told = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in told
    assert words in told and f"'{path}', line 3" in told


def test_the_root_of_detectron2s_datasets_is_advised_for_those_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("datasets_mine/a.json", "datasets/mine/a.json"):
        mine = {"json_file": file, "image_root": "x"}
        with pytest.raises(UserError) as error:
            _check_paths("mine", mine)
        assert "DETECTRON2_DATASETS" not in str(error.value)
    assert "coco_2017_val" in DatasetCatalog.list()
    known = MetadataCatalog.get("coco_2017_val")
    away = {"json_file": str(tmp_path / "nosuch.json"), "image_root": known.image_root}
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        _check_paths("coco_2017_val", away)


def test_runs_are_not_mixed_and_the_trainings_config_stays(tmp_path, capsys):
    dataset = write_dataset(tmp_path)
    config = write_lazy_config(tmp_path / "lazy.yaml")
    output = tmp_path / "a=b, (c)"
    command = ["--config-file", config, *dataset, f"train.output_dir={output}"]
    output.mkdir()
    (output / "log.txt").write_text("of a run that failed early\n")
    run(*command, "train.max_iter=1")
    left = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    with pytest.raises(SystemExit) as refused:
        run(*command, "train.max_iter=2")
    assert refused.value.code == 2 and "--resume" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == left

    config_of_training = (output / "config.yaml").read_bytes()
    weights = f"train.init_checkpoint={output}/model_final.pth"
    run("--eval-only", *command, weights, "dataloader.test.batch_size=3")
    assert (output / "config.yaml").read_bytes() == config_of_training
    evaluated = load_config(str(output / "inference" / "config.yaml"))
    assert evaluated.dataloader.test.batch_size == 3

    run("--resume", *command, "train.max_iter=2")
    assert (output / "model_final.pth").read_bytes() != left[output / "model_final.pth"]


# One GPU for each process


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Stands in for torch.cuda and the group of processes; returns a function that starts rank 0
    of two, of which the other one has the GPU `other`."""

    def start(visible: int, other: str):
        used = []
        store = dist.HashStore()
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in {**variables, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", used.append)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(uuid=f"{index}" if visible > 1 else "first"),
        )
        monkeypatch.setattr(launch_module.socket, "gethostname", lambda: "host")
        monkeypatch.setattr(launch_module, "_store_of_attempt", lambda: store)
        monkeypatch.setattr(launch_module, "_create_local_process_group", lambda size: None)
        monkeypatch.setattr(launch_module, "_end_process_groups", lambda: None)
        monkeypatch.setattr(dist, "init_process_group", lambda **_: None)
        store.set("device_of_1", f"GPU {other} on host")
        launch_module.launch_processes(lambda: used.append("ran"), 1)
        return used

    return start


def test_each_process_may_see_its_own_gpu_only(gpus):
    assert gpus(visible=1, other="second") == [0, "ran"]
    assert gpus(visible=2, other="1") == [0, "ran"]


def test_processes_do_not_share_a_gpu(gpus):
    with pytest.raises(UserError, match="first"):
        gpus(visible=1, other="first")


def test_the_second_process_uses_the_only_gpu_it_sees(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch_module._device_index(5) == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launch_module._device_index(5) == 5


def test_ddp_is_given_the_device_of_the_process(monkeypatch):
    monkeypatch.setattr(loop_module, "create_ddp_model", lambda model, **options: options)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    recipe = SimpleNamespace(device="cuda", ddp={"broadcast_buffers": False})
    expected = {"broadcast_buffers": False, "device_ids": [0]}
    assert loop_module._distributed(None, recipe) == expected


# How often annotations are read


def test_annotations_are_parsed_once_by_each_of_their_readers(tmp_path, monkeypatch):
    """The dataset check, Detectron2's loader and, for a test set, the evaluator."""
    folders = {name: tmp_path / name for name in ("parsed_train", "parsed_val")}
    options = []
    for name, folder in folders.items():
        folder.mkdir()
        options += write_dataset(folder, name)
    parsed = Counter()
    load = json.load

    def counting(file, *args, **kwargs):
        parsed[Path(getattr(file, "name", "")).parent.name] += 1
        return load(file, *args, **kwargs)

    monkeypatch.setattr(json, "load", counting)
    output = tmp_path / "output"
    command = ["--config-file", write_lazy_config(tmp_path / "lazy.yaml"), *options]
    names = [
        "dataloader.train.dataset.names=parsed_train",
        "dataloader.test.dataset.names=parsed_val",
        "dataloader.evaluator.dataset_name=parsed_val",
    ]
    run(*command, *names, f"train.output_dir={output}", "train.max_iter=1")
    assert {name: parsed[name] for name in folders} == {"parsed_train": 2, "parsed_val": 3}

    for name in folders:  # an evaluation is a program of its own
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    parsed.clear()
    weights = f"train.init_checkpoint={output}/model_final.pth"
    run("--eval-only", *command, *names, f"train.output_dir={output}", weights)
    assert {name: parsed[name] for name in folders} == {"parsed_train": 0, "parsed_val": 3}
