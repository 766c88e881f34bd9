"""Losses that are not finite: a step that ends the training, or is left out."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from detectron2.engine import hooks

from msrcnn_d2.engine.bad_images import BadImages
from msrcnn_d2.engine.trainer import FiniteAMPTrainer, FiniteTrainer, adapt_forward
from msrcnn_d2.utils.distributed import StepAgreement
from msrcnn_d2.utils.errors import UserError
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


def trainer_of(inputs, model=None, max_nonfinite_steps=0):
    model = model or Line()
    return FiniteTrainer(
        *(model, [torch.tensor(float(x)) for x in inputs]),
        torch.optim.SGD(model.parameters(), lr=1.0),
        max_nonfinite_steps=max_nonfinite_steps,
        agreement=StepAgreement(),
        image_ids=lambda: ["7", "8"],
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(value):
    trainer = trainer_of([0.25, value])
    with pytest.raises(UserError) as stopped:
        trainer.train(0, 2)
    assert str(stopped.value).startswith(f"Iteration 1: slope is {value} (images 7, 8).")
    assert trainer.model.weight.item() == 0.75


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    trainer = trainer_of([0.0], Root())
    with pytest.raises(UserError) as stopped:
        trainer.train(0, 1)
    expected = "Iteration 0: the gradient of weight is not finite (images 7, 8)."
    assert str(stopped.value).startswith(expected)
    assert trainer.model.weight.item() == 1


def test_gradients_with_an_infinite_norm_are_finite():
    """Their squares overflow, they do not."""
    trainer = trainer_of([1e25])
    trainer.train(0, 1)
    assert trainer.model.weight.item() == pytest.approx(-1e25)


@pytest.mark.parametrize(
    "others, expected",
    [
        ((["slope is inf"], [], ["9"]), "slope is nan, slope is inf (images 7, 8, 9)"),
        ((["slope is nan"], [], ["9"]), "slope is nan (images 7, 8, 9)"),
        (([], [], ["9"]), "slope is nan (images 7, 8)"),  # it has no part in it
    ],
)
def test_the_images_of_all_processes_with_such_a_loss_are_named(others, expected, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda own: [own, others])
    with pytest.raises(UserError) as stopped:
        trainer_of([math.nan]).train(0, 1)
    assert str(stopped.value).startswith(f"Iteration 0: {expected}.")


def test_the_images_of_all_processes_are_named_for_a_gradient_which_they_share(monkeypatch):
    monkeypatch.setattr(
        "detectron2.utils.comm.all_gather", lambda own: [own, ([], ["weight"], ["9"])]
    )
    with pytest.raises(UserError) as stopped:
        trainer_of([0.0], Root()).train(0, 1)
    assert "the gradient of weight is not finite (images 7, 8, 9)." in str(stopped.value)


def test_so_many_steps_may_be_left_out():
    trainer = trainer_of([0.25, math.nan, 0.25, math.inf, 0.125, math.nan], max_nonfinite_steps=2)
    with pytest.raises(UserError):
        trainer.train(0, 6)
    assert trainer.iter == 5 and trainer.model.weight.item() == 1 - 0.25 - 0.25 - 0.125


def test_a_resumed_training_goes_on_counting_steps_left_out():
    trainer = trainer_of([math.nan, 0.25], max_nonfinite_steps=1)
    trainer.train(0, 2)
    state = copy.deepcopy(trainer.state_dict())
    resumed = trainer_of([math.nan], max_nonfinite_steps=1)
    resumed.load_state_dict(state)
    with pytest.raises(UserError):
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
        trainer = FiniteAMPTrainer(
            *(model, [torch.tensor(float(x)) for x in inputs]),
            torch.optim.SGD(model.parameters(), lr=1.0, fused=fused),
            torch.amp.GradScaler("cpu", init_scale=scale),
            max_nonfinite_steps=0,
            max_skipped_steps=max_skipped_steps,
            agreement=StepAgreement(),
            image_ids=lambda: ["7", "8"],
        )
        scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
        trainer.register_hooks([hooks.LRScheduler(trainer.optimizer, scheduler)])
        return trainer

    return build


@pytest.mark.parametrize("fused", [False, True])  # the scaler leaves it to a fused optimizer
def test_so_many_steps_in_a_row_may_be_skipped(amp_trainer_of, fused):
    trainer = amp_trainer_of([-1, -1, 1, -1, -1, -1, 1], max_skipped_steps=3, fused=fused)
    with pytest.raises(UserError) as stopped:
        trainer.train(0, 7)
    expected = "Iteration 5: the gradient of weight is not finite (images 7, 8)."
    assert trainer.iter == 5 and str(stopped.value).startswith(expected)
    assert "3 steps" in str(stopped.value)
    assert trainer.model.weight.item() == 1


def test_a_scale_that_has_fallen_to_nothing_stops(amp_trainer_of):
    trainer = amp_trainer_of([-1] * 9, scale=2.0**-17)  # 2 ** -20 is under 1e-6
    with pytest.raises(UserError):
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
    with pytest.raises(UserError):
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


# Whole trainings


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


def test_a_diverging_training_says_where_and_what_to_do(diverged):
    output, error = diverged
    assert error.count("error: ") == 1
    (iteration, images) = re.search(
        r"error: Iteration (\d+): .* \(images (.*?)\)\.", error
    ).groups()
    assert 0 < int(iteration) < 6 and len(images.split(", ")) == 2
    for key in ("MAX_NONFINITE_STEPS", "DETECT_ANOMALY", "BASE_LR"):
        assert f"SOLVER.{key}" in error
    assert not (output / "model_final.pth").exists()


@pytest.mark.parametrize("detect", [False, True])
def test_pytorch_looks_for_nan_if_the_config_says_so(detect, base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        BadImages, "after_step", lambda self: seen.append(torch.is_anomaly_enabled())
    )
    options = ["train.max_iter=1", f"train.output_dir={tmp_path}", "dataloader.evaluator=null"]
    run(*base, *options, f"train.detect_anomaly={detect}")
    assert seen == [detect] and not torch.is_anomaly_enabled()
