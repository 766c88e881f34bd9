"""Learning rate and schedule for other batches than that of the config."""

import re

import pytest
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import OmegaConf

from detectron2.config import LazyConfig, instantiate

from msrcnn_d2 import model_zoo
from msrcnn_d2.engine import build_recipe, load_config, scale_to_batch
from msrcnn_d2.utils.errors import UserError

LAZY = model_zoo.get_config_file("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py")
YAML = LAZY.replace(".py", ".yaml")
BATCH = {LAZY: "dataloader.train.total_batch_size", YAML: "SOLVER.IMS_PER_BATCH"}
LAZY_KEYS = ("optimizer.lr", "train.max_iter", "train.eval_period", "train.checkpointer.period")


def scaled(path, *overrides, scale=True):
    return scale_to_batch(load_config(path, overrides), overrides, scale)


def schedule(cfg):
    """(learning rate, iterations, warm-up, steps, periods of evaluation and checkpoints)"""
    if "SOLVER" in cfg:
        s = cfg.SOLVER
        periods = (cfg.TEST.EVAL_PERIOD, s.CHECKPOINT_PERIOD)
        return (s.BASE_LR, s.MAX_ITER, s.WARMUP_ITERS, s.STEPS, *periods)
    lr, max_iter, *periods = (OmegaConf.select(cfg, key) for key in LAZY_KEYS)
    multiplier: ParamScheduler = instantiate(cfg.lr_multiplier)
    values = [multiplier(k / 720) for k in range(720)]
    warmup = values.index(1)
    steps = [k for k in range(warmup + 1, 720) if values[k] < values[k - 1]]
    warmup, *steps = (k * max_iter / 720 for k in (warmup, *steps))
    return (lr, max_iter, warmup, tuple(steps), *periods)


# A quarter of the images: 4 times the iterations. Twice as many: half of them
EXPECTED = {
    4: (0.005, 360_000, 4_000, (240_000, 330_000), 20_000, 20_000),
    32: (0.04, 45_000, 500, (30_000, 41_250), 2_500, 2_500),
}


@pytest.mark.parametrize("batch", EXPECTED)
@pytest.mark.parametrize("path", [LAZY, YAML], ids=["lazy", "yaml"])
def test_schedule_by_hand(path, batch):
    cfg = load_config(path, [f"{BATCH[path]}={batch}"])
    if path == YAML:
        cfg.TEST.EVAL_PERIOD = 5000  # the file has none
    cfg, note = scale_to_batch(cfg, [f"{BATCH[path]}={batch}"], True)
    found = schedule(cfg)
    assert found[0] == pytest.approx(EXPECTED[batch][0]) and found[1:] == EXPECTED[batch][1:]
    recipe = build_recipe(cfg)
    assert (recipe.total_batch_size, recipe.max_iter) == (batch, EXPECTED[batch][1])
    lr, max_iter = f"{EXPECTED[batch][0]:g}", str(EXPECTED[batch][1])
    assert "0.02" in note and lr in note and max_iter in note and "\n" not in note
    # Its own config, if it is saved, is made for this batch
    assert scale_to_batch(cfg, [], True)[1] == scale_to_batch(cfg, [], False)[1] == ""


@pytest.mark.parametrize(
    "path, overrides",
    [
        (LAZY, ["train.max_iter=100", "optimizer.lr=0.1"]),
        (YAML, ["SOLVER.MAX_ITER", "100", "SOLVER.BASE_LR=0.1"]),
    ],
    ids=["lazy", "yaml"],
)
def test_what_the_command_line_sets_is_not_scaled(path, overrides):
    cfg, _ = scaled(path, f"{BATCH[path]}=8", *overrides)
    lr, max_iter, *_, period = schedule(cfg)
    assert (lr, max_iter, period) == (0.1, 100, 10_000)


@pytest.mark.parametrize("path", [LAZY, YAML], ids=["lazy", "yaml"])
def test_another_batch_without_scaling_is_told_unless_somebody_chose_the_rate(path):
    lr = {LAZY: "optimizer.lr=0.01", YAML: "SOLVER.BASE_LR=0.01"}[path]
    for overrides, told in [
        ([f"{BATCH[path]}=4"], True),
        ([f"{BATCH[path]}=4", lr], False),
        ([f"{BATCH[path]}=16"], False),
        ([], False),
    ]:
        before = schedule(load_config(path, overrides))
        cfg, note = scaled(path, *overrides, scale=False)
        assert schedule(cfg) == before
        assert bool(note) == told
        assert not told or all(x in note for x in ("16", " 4,", "0.005", "360000", "--scale-lr"))


def test_the_batch_of_ones_own_config_is_what_it_is_made_for(tmp_path):
    cfg = load_config(LAZY)
    cfg.dataloader.train.total_batch_size, cfg.train.reference_batch_size = 4, 0
    LazyConfig.save(cfg, str(tmp_path / "mine.yaml"))
    for scale in (False, True):
        found, note = scaled(str(tmp_path / "mine.yaml"), scale=scale)
        assert note == "" and found.optimizer.lr == 0.02
    # ... unless it says otherwise, in the file or on the command line
    found, note = scaled(str(tmp_path / "mine.yaml"), "train.reference_batch_size=16")
    assert found.optimizer.lr == 0.005 and found.train.reference_batch_size == 4
    yaml = tmp_path / "mine.yacs.yaml"
    yaml.write_text(f"_BASE_: {YAML}\nSOLVER: {{IMS_PER_BATCH: 4, REFERENCE_BATCH_SIZE: 16}}\n")
    found, note = scaled(str(yaml))
    assert found.SOLVER.BASE_LR == 0.005 and found.SOLVER.IMS_PER_BATCH == 4
    assert scaled(str(yaml), scale=False)[1]


@pytest.mark.parametrize("path", [LAZY, YAML], ids=["lazy", "yaml"])
def test_a_rate_that_somebody_chose_for_a_batch_is_not_scaled_by_its_saved_config(path, tmp_path):
    lr = {LAZY: "optimizer.lr=0.01", YAML: "SOLVER.BASE_LR=0.01"}[path]
    cfg, _ = scaled(path, f"{BATCH[path]}=4", lr, scale=False)
    saved = tmp_path / "config.yaml"
    if path == LAZY:
        LazyConfig.save(cfg, str(saved))
    else:
        saved.write_text(cfg.dump())
    for scale in (False, True):
        again, note = scaled(str(saved), scale=scale)
        assert note == "" and schedule(again) == schedule(cfg)


@pytest.mark.parametrize("path", [LAZY, YAML], ids=["lazy", "yaml"])
def test_the_warning_says_what_scaling_would_do(path):
    """Not to what is on the command line."""
    max_iter = {LAZY: "train.max_iter=7000", YAML: "SOLVER.MAX_ITER=7000"}[path]
    overrides = (f"{BATCH[path]}=4", max_iter)
    cfg, told = scaled(path, *overrides, scale=False)
    assert schedule(cfg)[:2] == (0.02, 7000)
    cfg, done = scaled(path, *overrides)
    assert schedule(cfg)[:2] == (0.005, 7000)
    changes = re.findall(r"[\w.]+ [^ ]+ -> [\d.]*\d", done)
    assert "28000" not in told and len(changes) >= 2 and all(change in told for change in changes)


def test_rates_of_single_parameters_are_scaled_too(tmp_path):
    cfg = load_config(LAZY)
    cfg.optimizer.params.overrides = {
        **{"bias": {"lr": 0.04, "weight_decay": 0.0}, "norm": {"weight_decay": 0.0}},
        **{"other": {"lr": "${optimizer.lr}"}, "given": {"lr": 0.3}},
    }
    LazyConfig.save(cfg, str(tmp_path / "mine.yaml"))
    overrides = (f"{BATCH[LAZY]}=4", "optimizer.params.overrides.given.lr=0.5")
    cfg, note = scaled(str(tmp_path / "mine.yaml"), *overrides)
    groups = cfg.optimizer.params.overrides
    assert groups.bias == {"lr": 0.01, "weight_decay": 0.0} and groups.norm == {"weight_decay": 0.0}
    assert groups.other.lr == cfg.optimizer.lr == 0.005 and groups.given.lr == 0.5
    assert "bias.lr 0.04 -> 0.01" in note and "given" not in note


def test_a_config_without_a_rate_of_the_optimizer(tmp_path):
    cfg = load_config(LAZY)
    del cfg.optimizer["lr"]
    cfg.optimizer.params.base_lr = 0.02
    LazyConfig.save(cfg, str(tmp_path / "mine.yaml"))
    overrides = (str(tmp_path / "mine.yaml"), f"{BATCH[LAZY]}=4")
    assert scaled(*overrides, scale=False)[1] == ""
    with pytest.raises(UserError, match="optimizer.lr"):
        scaled(*overrides)


def test_short_periods_stay_at_least_one():
    cfg, _ = scaled(LAZY, f"{BATCH[LAZY]}=160000")
    assert cfg.train.eval_period == cfg.train.checkpointer.period == 1
    cfg, _ = scaled(YAML, f"{BATCH[YAML]}=160000")
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (1, 0)


def test_a_config_that_scales_by_processes_is_not_scaled_twice():
    by_processes = (f"{BATCH[YAML]}=32", "SOLVER.REFERENCE_WORLD_SIZE=8")
    assert scaled(YAML, *by_processes, scale=False)[1] == ""
    with pytest.raises(UserError, match="twice"):
        scaled(YAML, *by_processes)
