"""The losses on held-out images: which numbers they are, and that they change nothing else."""

import json
import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from detectron2.config import LazyConfig
from detectron2.utils.events import EventStorage

from msrcnn_d2.engine import build_recipe, load_config
from msrcnn_d2.engine.configs import register_dataset
from msrcnn_d2.engine.hooks import LossPrinter
from msrcnn_d2.engine.preflight import refuse_other_run
from msrcnn_d2.engine.validation import validation_losses
from msrcnn_d2.utils.errors import UserError
from tests.helpers import forked
from tests.helpers.command import exit_code
from tests.helpers.toy import tiny_yacs_config
from tests.helpers.toy_training import lazy_config, run, write_dataset

pytestmark = pytest.mark.usefixtures("leave_no_traces")


@pytest.fixture(scope="module")
def toy_dataset(tmp_path_factory):
    """Options that register nine images as "toy"; the first one has no objects."""
    options = write_dataset(tmp_path_factory.mktemp("toy"))
    path = options[2]
    content = json.loads(open(path).read())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    with open(path, "w") as f:
        json.dump(content, f)
    return options


def write_config(kind, folder):
    """A training of six iterations, with the training images as its test set."""
    path = folder / f"{kind}.yaml"
    if kind == "lazy":
        LazyConfig.save(lazy_config(), str(path))
        return ["--config-file", str(path), f"train.output_dir={folder / 'output'}"]
    cfg = tiny_yacs_config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("toy",)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, 6, 1e-3
    cfg.SOLVER.STEPS = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 1
    path.write_text(cfg.dump())
    return ["--config-file", str(path), f"OUTPUT_DIR={folder / 'output'}"]


SETTINGS = {
    "lazy": {
        "enabled": "train.validation_loss.enabled",
        "num_images": "train.validation_loss.num_images",
        "dataset": "train.validation_loss.dataset",
        "eval_period": "train.eval_period",
        "val_metric": "train.best_checkpointer.val_metric",
        "mode": "train.best_checkpointer.mode",
        "patience": "train.early_stopping.patience",
        "min_delta": "train.early_stopping.min_delta",
    },
    "yacs": {
        "enabled": "TEST.VALIDATION_LOSS.ENABLED",
        "num_images": "TEST.VALIDATION_LOSS.NUM_IMAGES",
        "dataset": "TEST.VALIDATION_LOSS.DATASET",
        "eval_period": "TEST.EVAL_PERIOD",
        "val_metric": "SOLVER.BEST_CHECKPOINTER.VAL_METRIC",
        "mode": "SOLVER.BEST_CHECKPOINTER.MODE",
        "patience": "SOLVER.EARLY_STOPPING.PATIENCE",
        "min_delta": "SOLVER.EARLY_STOPPING.MIN_DELTA",
    },
}


def options_of(kind, **values):
    return [f"{SETTINGS[kind][name]}={value}" for name, value in values.items()]


def recipe_of(kind, folder, toy_dataset, **values):
    _, name, annotations, images = toy_dataset
    register_dataset(name, annotations, images)
    _, path, output = write_config(kind, folder)
    return build_recipe(load_config(path, [output, *options_of(kind, enabled=True, **values)]))


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


# ---- the numbers


@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_they_are_the_means_of_the_losses_of_single_images(kind, toy_dataset, tmp_path):
    recipe = recipe_of(kind, tmp_path, toy_dataset)
    torch.manual_seed(1)
    model = recipe.build_model().train()
    losses = validation_losses(recipe, model)

    # The same by hand: there is neither batch norm nor dropout that would make a difference
    batches = [batch for batch in recipe.validation_set.build_loader()]
    assert [len(batch) for batch in batches] == [1] * 9
    assert len(batches[0][0]["instances"]) == 0 < len(batches[1][0]["instances"])
    expected = {}
    for batch in batches:
        torch.manual_seed(0)
        with EventStorage(), quiet(model):
            for name, loss in model(batch).items():
                expected[name] = expected.get(name, 0) + loss.item() / 9
    assert {"loss_mask_iou", "loss_mask", "loss_rpn_cls"} < set(expected)
    assert losses.pop("total_loss") == pytest.approx(sum(expected.values()))
    assert losses == pytest.approx(expected)


def quiet(model):
    """With batch norm as in a test."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return nullcontext()


def test_nothing_changes_and_the_same_weights_have_the_same_losses(toy_dataset, tmp_path):
    recipe = recipe_of("lazy", tmp_path, toy_dataset, num_images=3)
    model = recipe.build_model().train()
    model.backbone.bottom_up.stem = nn.Sequential(
        model.backbone.bottom_up.stem, nn.Dropout(0.5), NormAndActivation(8)
    )
    model.proposal_generator.eval().train()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with EventStorage() as storage:
        first = validation_losses(recipe, model)
        assert not storage.histories()
    torch.manual_seed(5)
    second = validation_losses(recipe, model)
    assert first == second and all(map(math.isfinite, first.values()))
    torch.set_rng_state(generators[0])
    random.setstate(generators[2])
    with EventStorage():
        validation_losses(recipe, model)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]
    assert random.getstate() == generators[2]
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.backbone.bottom_up.stem[2].num_batches_tracked == 0


class NormAndActivation(nn.BatchNorm2d):
    """With a layer in it, as timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(super().forward(x))


@pytest.mark.parametrize("num_images, expected", [(0, 9), (3, 3), (99, 9)])
def test_the_images_are_spread_evenly(num_images, expected, toy_dataset, tmp_path):
    recipe = recipe_of("lazy", tmp_path, toy_dataset, num_images=num_images)
    ids = [batch[0]["image_id"] for batch in recipe.validation_set.build_loader()]
    assert ids == list(range(1, 10, 9 // expected))


def test_predictions_that_are_not_finite_are_nan(toy_dataset, tmp_path):
    recipe = recipe_of("lazy", tmp_path, toy_dataset, num_images=1)
    model = recipe.build_model().train()
    nn.init.constant_(model.proposal_generator.rpn_head.objectness_logits.weight, math.nan)
    assert math.isnan(validation_losses(recipe, model)["total_loss"])


# ---- whole trainings


@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_a_training_by_validation_loss(kind, toy_dataset, tmp_path):
    output = tmp_path / "output"
    config, path, _ = write_config(kind, tmp_path)
    key = "train.output_dir" if kind == "lazy" else "OUTPUT_DIR"
    base = [config, path, *toy_dataset, *options_of(kind, eval_period=2)]
    by_loss = {"val_metric": "validation/total_loss", "mode": "min"}
    options = options_of(kind, enabled=True, num_images=3, patience=1, min_delta=1000, **by_loss)
    run(*base, *options, f"{key}={output}")

    losses = [m for m in metrics_of(output) if "validation/total_loss" in m]
    assert [m["iteration"] for m in losses] == [1, 3]  # no gain of 1000: it stops early
    best = torch.load(output / "model_best.pth")
    assert best["iteration"] == min(losses, key=lambda m: m["validation/total_loss"])["iteration"]
    assert torch.load(output / "model_final.pth")["iteration"] == 3
    board = EventAccumulator(str(output)).Reload()
    shown = board.Scalars("validation/loss_mask_iou")
    assert [x.step for x in shown] == [1, 3]
    assert [x.value for x in shown] == pytest.approx(
        [m["validation/loss_mask_iou"] for m in losses]
    )

    with pytest.raises(UserError, match="model_final.pth"):
        refuse_other_run(str(output))
    (output / "model_final.pth").unlink()
    with pytest.raises(UserError, match="model_best.pth"):
        refuse_other_run(str(output))


def test_evaluations_do_not_change_the_losses_of_the_training(toy_dataset, tmp_path):
    config = write_config("lazy", tmp_path)
    found = []
    for options in (
        options_of("lazy", enabled=True, num_images=1, eval_period=1),
        ["train.eval_period=0"],
    ):
        output = tmp_path / f"output_{len(found)}"
        run(*config, *toy_dataset, *options, f"train.output_dir={output}", "train.max_iter=3")
        found.append({m["iteration"]: m.get("total_loss") for m in metrics_of(output)})
    assert found[0] == found[1] and len(found[0]) == 4


def test_two_processes_have_the_losses_of_one_and_stop_together(toy_dataset, tmp_path):
    config = write_config("lazy", tmp_path)
    options = options_of("lazy", enabled=True, eval_period=2, patience=1, min_delta=1000)
    log = tmp_path / "log.txt"
    spawn = ["--num-gpus", 2, "--dist-url", "auto"]
    job = forked.start(forked.train, *config, *toy_dataset, *options, *spawn, log=log)
    job.join(300)
    assert job.exitcode == 0, log.read_text()[-3000:]
    output = tmp_path / "output"
    last = [m for m in metrics_of(output) if "validation/total_loss" in m][-1]
    assert last["iteration"] == 3

    recipe = recipe_of("lazy", tmp_path, toy_dataset)
    model = recipe.build_model().train()
    model.load_state_dict(torch.load(output / "model_final.pth")["model"])
    losses = validation_losses(recipe, model)
    assert {f"validation/{k}": v for k, v in losses.items()} == {
        k: v for k, v in last.items() if k.startswith("validation/")
    }


@pytest.mark.parametrize(
    "values, told",
    [
        ({"val_metric": "segm/APP", "eval_period": 2}, "did you mean segm/AP"),
        ({"val_metric": "validation/total_loss", "eval_period": 2}, "validation_loss.enabled"),
        ({"val_metric": "validation/loss_cls", "enabled": True, "eval_period": 2}, "mode=min"),
        ({"patience": 2}, "train.eval_period"),
        ({"patience": 2, "eval_period": 2, "val_metric": '""'}, "val_metric"),
        ({"patience": -1}, "patience"),
        ({"mode": "most"}, "max or min"),
        ({"enabled": True, "dataset": "nosuch"}, "'nosuch'"),
    ],
)
@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_mistakes_are_met_before_training(kind, values, told, toy_dataset, tmp_path, capsys):
    config = write_config(kind, tmp_path)
    assert exit_code("train", *config, *toy_dataset, *options_of(kind, **values)) == 2
    error = capsys.readouterr().err
    expected = {"lazy": told, "yacs": told}[kind]
    assert error.count("error: ") == 1 and expected in error, error


# ---- the log


def test_a_line_of_the_log(caplog):
    printer = LossPrinter(max_iter=100)
    with EventStorage() as storage, caplog.at_level("INFO", logger="msrcnn_d2"):
        for iteration in range(3):
            storage.iter = iteration
            storage.put_scalars(total_loss=iteration, loss_cls=0.5, loss_mask=0.25, data_time=0.125)
            if iteration:
                storage.put_scalars(time=2.0, lr=0.01)
            storage.put_scalar("validation/total_loss", 7.0)
            printer.write()
        storage.iter = 100
        printer.write()  # nothing new, as at the end
        first, _, last = caplog.messages
        assert storage.latest()["eta_seconds"] == (2 * 97, 2)
    assert "eta" not in first and "total_loss: 0 (cls 0.5, mask 0.25)" in first
    assert last == (
        "iter: 2 of 100  eta: 0:03:14  total_loss: 1 (cls 0.5, mask 0.25)  time: 2.0000  "
        "data_time: 0.1250  lr: 0.01" + "  max_mem: 0M" * torch.cuda.is_available()
    )
