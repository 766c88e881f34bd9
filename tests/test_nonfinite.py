"""Losses that are not finite: a step that stops, can be run again, or is left out."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from detectron2.engine import hooks
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from msrcnn_d2.checkpoint.reading import read_file
from msrcnn_d2.engine import replay as replay_module
from msrcnn_d2.engine.plain_batch import from_plain, to_plain
from msrcnn_d2.engine.trainer import FiniteAMPTrainer, FiniteTrainer, adapt_forward
from msrcnn_d2.utils.distributed import StepAgreement
from msrcnn_d2.utils.errors import UserError
from tests.helpers.toy import toy_instances
from tests.helpers.toy_training import run, write_dataset, write_lazy_config

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
        agreement=StepAgreement(),
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


# Mixed precision


class Scaled(Line):
    """Its loss is finite, and its gradient NaN where the input is negative."""

    def forward(self, x):
        return {"root": x.abs() + 0 * (self.weight * x).sqrt().nan_to_num()}


@pytest.fixture
def amp_trainer_of(monkeypatch):
    """A function like `trainer_of`, with the gradient scaler on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # Detectron2 asserts it

    def build(inputs, max_skipped_steps=50, scale=65536.0, fused=False):
        model = Scaled()

        def stop(description, advice):
            raise Stopped(description, advice)

        trainer = FiniteAMPTrainer(
            *(model, [torch.tensor(float(x)) for x in inputs]),
            torch.optim.SGD(model.parameters(), lr=1.0, fused=fused),
            torch.amp.GradScaler("cpu", init_scale=scale),
            max_nonfinite_steps=0,
            max_skipped_steps=max_skipped_steps,
            agreement=StepAgreement(),
            describe=lambda losses, gradients: f"{losses} {gradients}",
            stop=stop,
        )
        scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
        trainer.register_hooks([hooks.LRScheduler(trainer.optimizer, scheduler)])
        return trainer

    return build


@pytest.mark.parametrize("fused", [False, True])  # the scaler leaves it to a fused optimizer
def test_so_many_steps_in_a_row_may_be_skipped(amp_trainer_of, fused):
    trainer = amp_trainer_of([-1, -1, 1, -1, -1, -1, 1], max_skipped_steps=3, fused=fused)
    with pytest.raises(Stopped) as stopped:
        trainer.train(0, 7)
    description, advice = stopped.value.args
    assert trainer.iter == 5 and description == "[] ['weight']" and "3 steps" in advice
    assert trainer.model.weight.item() == 1


def test_a_scale_that_has_fallen_to_nothing_stops(amp_trainer_of):
    trainer = amp_trainer_of([-1] * 9, scale=2.0**-17)  # 2 ** -20 is under 1e-6
    with pytest.raises(Stopped):
        trainer.train(0, 9)
    assert trainer.iter == 2


def test_a_scale_that_is_looked_for_is_no_reason_for_a_word(amp_trainer_of, caplog, recwarn):
    trainer = amp_trainer_of([-1, -1, 1, 1])
    trainer.train(0, 4)
    assert trainer.grad_scaler.get_scale() == 65536 / 4
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    assert not [r for r in caplog.records if r.name.startswith("msrcnn_d2")]


def test_a_resumed_training_goes_on_counting_skipped_steps(amp_trainer_of):
    trainer = amp_trainer_of([-1, -1], max_skipped_steps=3)
    trainer.train(0, 2)
    resumed = amp_trainer_of([-1], max_skipped_steps=3)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    with pytest.raises(Stopped):
        resumed.train(2, 3)


# Copies


class Watchful(nn.Module):
    """Its loss is weight x input; like Detectron2's RPN it refuses what is not finite."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        if not self.weight.isfinite():
            raise FloatingPointError("the weight is not finite")
        return {"weight": self.weight * inputs}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_in_training_calls_its_own_weights(copied, autocast):
    model = Watchful()
    adapt_forward(model, autocast_on_cpu=autocast)
    twin = copied(model)
    with torch.no_grad():
        twin.weight.fill_(3)
    assert twin(1.0)["weight"].item() == 3 and model(1.0)["weight"].item() == 1
    assert twin.state_dict().keys() == {"weight"}
    with torch.no_grad():
        twin.weight.fill_(math.nan)
    (loss,) = twin(1.0).values()
    loss.backward()
    assert loss.isnan() and twin.weight.grad.isnan() and model.weight.grad is None
    with pytest.raises(FloatingPointError):
        twin.eval()(1.0)


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

    def too_high(trainer, loss_dict):
        losses.update({k: v.item() for k, v in loss_dict.items()})
        return loss_dict, ["loss_cls is too high"], []

    monkeypatch.setattr(FiniteTrainer, "_fetch", too_high)
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
