"""Losses that are not finite: a step that stops, can be run again, or is left out."""

import copy
import math

import pytest
import torch
from torch import nn

from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from msrcnn_d2.checkpoint.reading import read_file
from msrcnn_d2.engine import replay as replay_module
from msrcnn_d2.engine.plain_batch import from_plain, to_plain
from msrcnn_d2.engine.trainer import FiniteTrainer
from msrcnn_d2.errors import UserError

from toy import toy_instances
from toy_training import run, write_dataset, write_lazy_config

pytestmark = pytest.mark.usefixtures("leave_no_traces")


class Line(nn.Module):
    """Its loss is weight x input + weight x 0, the second part named "other"."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"slope": self.weight * x, "other": self.weight * 0}


class Root(Line):
    """Finite everywhere, but its gradient is not at 0."""

    def forward(self, x):
        return {"root": (self.weight * x).abs().sqrt()}


class Stopped(Exception):
    pass


def trainer_of(inputs, model=None, max_nonfinite_steps=0):
    model = model or Line()

    def stop(description):
        raise Stopped(description)

    return FiniteTrainer(
        *(model, [torch.tensor(float(x)) for x in inputs]),
        torch.optim.SGD(model.parameters(), lr=1.0),
        max_nonfinite_steps=max_nonfinite_steps,
        describe=lambda losses, gradients: f"{losses} {gradients}",
        stop=stop,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(value):
    trainer = trainer_of([0.25, value])
    with pytest.raises(Stopped) as stopped:
        trainer.train(0, 2)
    assert str(stopped.value) == f"['slope is {value}'] []"
    assert trainer.model.weight.item() == 0.75


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    trainer = trainer_of([0.0], Root())
    with pytest.raises(Stopped) as stopped:
        trainer.train(0, 1)
    assert str(stopped.value) == "[] ['weight']"
    assert trainer.model.weight.item() == 1


def test_gradients_with_an_infinite_norm_are_finite():
    """Their squares overflow, they do not."""
    trainer = trainer_of([1e25])
    trainer.train(0, 1)
    assert trainer.model.weight.item() == pytest.approx(-1e25)


def test_so_many_steps_may_be_left_out():
    trainer = trainer_of([0.25, math.nan, 0.25, math.inf, 0.125, math.nan], max_nonfinite_steps=2)
    with pytest.raises(Stopped):
        trainer.train(0, 6)
    assert trainer.iter == 5 and trainer.model.weight.item() == 1 - 0.25 - 0.25 - 0.125


def test_a_resumed_training_goes_on_counting_steps_left_out():
    trainer = trainer_of([math.nan, 0.25], max_nonfinite_steps=1)
    trainer.train(0, 2)
    state = copy.deepcopy(trainer.state_dict())
    resumed = trainer_of([math.nan], max_nonfinite_steps=1)
    resumed.load_state_dict(state)
    with pytest.raises(Stopped):
        resumed.train(2, 3)
    old = trainer_of([])
    del state["num_nonfinite_steps"]  # of a checkpoint from before there was such a count
    old.load_state_dict(state)


# The step that is kept


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_a_batch_comes_back_from_plain_data(mask_format, tmp_path):
    instances = toy_instances(mask_format)[0]
    instances.gt_keypoints = Keypoints(torch.rand(len(instances), 3, 3))
    batch = [{"image": torch.rand(3, 4, 5), "image_id": 7, "file_name": "a.png"}]
    batch[0]["instances"] = instances
    torch.save({"batch": to_plain(batch)}, tmp_path / "batch.pth")
    (back,) = from_plain(read_file(str(tmp_path / "batch.pth"))["batch"])  # which trusts no file
    assert back["image"].equal(batch[0]["image"])
    assert (back["image_id"], back["file_name"]) == (7, "a.png")
    again = back["instances"]
    assert isinstance(again, Instances) and again.image_size == instances.image_size
    assert again.gt_boxes.tensor.equal(instances.gt_boxes.tensor)
    assert again.gt_keypoints.tensor.equal(instances.gt_keypoints.tensor)
    assert isinstance(again.gt_boxes, Boxes)
    if mask_format == "bitmask":
        assert isinstance(again.gt_masks, BitMasks)
        assert again.gt_masks.tensor.equal(instances.gt_masks.tensor)
    else:
        assert isinstance(again.gt_masks, PolygonMasks)
        for a, b in zip(again.gt_masks.polygons, instances.gt_masks.polygons):
            assert all((x == y).all() for x, y in zip(a, b))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = write_lazy_config(folder / "lazy.yaml")
    return ["--config-file", config, *write_dataset(folder)]


@pytest.fixture
def diverged(base, tmp_path, capsys):
    """The output folder and the error of a training with a learning rate that is far too high."""
    options = ["optimizer.lr=1e12", "lr_multiplier.warmup_factor=1", f"train.output_dir={tmp_path}"]
    with pytest.raises(SystemExit) as left:
        run(*base, *options)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return tmp_path, captured.err


def test_a_diverging_training_says_where_and_keeps_the_step(diverged):
    output, error = diverged
    (step,) = (output / "nonfinite").iterdir()
    iteration = int(step.stem[-7:])
    kept = read_file(str(step))
    assert kept["iteration"] == iteration and len(kept["batches"]) == 1
    ids = [x["image_id"] for x in kept["batches"][0]["inputs"]]
    assert error.count("error: ") == 1
    assert f"error: Iteration {iteration}: " in error
    assert f"(images {', '.join(map(str, ids))})." in error
    assert f"`python -m msrcnn_d2.engine.replay {step}` runs the step again" in error
    assert "train.max_nonfinite_steps=N (yaml: SOLVER.MAX_NONFINITE_STEPS; now 0)" in error
    assert not (output / "model_final.pth").exists()


def test_the_kept_step_is_the_step(diverged, capsys):
    output, error = diverged
    (step,) = (output / "nonfinite").iterdir()
    replay_module.main(replay_module.argument_parser().parse_args([str(step)]))
    printed = capsys.readouterr().out
    (result,) = replay_module.replay(str(step), str(output / "config.yaml"))
    wrong = [f"{k} is {v}" for k, v in result["losses"].items() if not math.isfinite(v)]
    assert all(text in error for text in wrong)
    assert wrong or result["gradients"]
    assert ", ".join(map(str, result["images"])) in printed
    assert "first module whose output is not finite: " in printed


def test_a_step_that_is_finite_is_repeated_to_the_last_bit(base, tmp_path, monkeypatch):
    """Everything random in a step follows from its seed."""
    losses = {}

    def too_high(loss_dict):
        losses.update({k: v.item() for k, v in loss_dict.items()})
        return ["loss_cls is too high"]

    monkeypatch.setattr("msrcnn_d2.engine.trainer._nonfinite_losses", too_high)
    with pytest.raises(SystemExit):
        run(*base, f"train.output_dir={tmp_path}")
    (step,) = (tmp_path / "nonfinite").iterdir()
    (result,) = replay_module.replay(str(step), str(tmp_path / "config.yaml"))
    assert result["losses"] == losses
    assert (result["gradients"], result["first"]) == ([], None)


def test_a_file_that_is_no_step_is_refused(base, tmp_path):
    run(*base, "train.max_iter=1", f"train.output_dir={tmp_path}")
    with pytest.raises(UserError, match="is no step of a training: give a file in nonfinite/"):
        replay_module.replay(str(tmp_path / "model_final.pth"), str(tmp_path / "config.yaml"))
