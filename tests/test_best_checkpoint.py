"""The best checkpoint and early stopping: what is kept, when training ends, and resuming both."""

import json
import math
import re
import shutil
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detectron2.evaluation import COCOEvaluator

from msrcnn_d2 import model_zoo
from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.engine import build_recipe, check_metric, load_config
from msrcnn_d2.engine.best_checkpoint import BestCheckpointer, StoppedEarly
from msrcnn_d2.utils.errors import UserError
from tests.helpers.killable import Training, ap_of
from tests.helpers.toy_training import write_dataset, write_lazy_config

NAN = math.nan


# ---- a trainer without a model


class Trainer:
    """Evaluates after each iteration; the weight is the number of the iteration."""

    def __init__(self, folder, results, **options):
        self.results = results
        self.max_iter = len(results)
        self.iter = self.start_iter = 0
        self.model = nn.Linear(1, 1, bias=False)
        self.checkpointer = MaskScoringCheckpointer(self.model, str(folder), trainer=self)
        self.hook = BestCheckpointer(
            self.checkpointer, **{"val_metric": "segm/AP", "mode": "max", **options}
        )
        self.hook.trainer = self

    def state_dict(self):
        hooks = {"BestCheckpointer": self.hook.state_dict()}
        return {"iteration": self.iter, "hooks": hooks}

    def load_state_dict(self, state):
        self.start_iter = state["iteration"] + 1
        self.hook.load_state_dict(state["hooks"]["BestCheckpointer"])

    def train(self, until=None):
        """As Detectron2's; stops before an iteration as if killed. Returns whether it is early."""
        self.checkpointer.resume_or_load("", resume=True)
        self.iter = self.start_iter
        self.hook.before_train()
        last = self.start_iter - 1
        if last >= 0 and last not in self.hook.history:  # as EvalHook
            self.iter = last
            self.hook.update({"segm": {"AP": self.results[last]}})
        for iteration in range(self.start_iter, self.max_iter if until is None else until):
            self.iter = iteration
            try:
                self.hook.before_step()
            except StoppedEarly:
                return True
            nn.init.constant_(self.model.weight, self.iter)
            self.hook.update({"segm": {"AP": self.results[self.iter]}})
        return False


def contents(folder, name="model_best"):
    """The weight in a checkpoint, the iteration and the results so far."""
    found = torch.load(folder / f"{name}.pth")
    trainer = found["trainer"]
    assert trainer["iteration"] == found["iteration"]
    history = trainer["hooks"]["BestCheckpointer"]["history"]
    return found["model"]["weight"].item(), found["iteration"], history


@pytest.mark.parametrize(
    "results, options, best, last",
    [
        ([1, 3, 2, 5, 4, 4], {}, 3, 5),
        ([1, 3, 2, 5, 4, 4], {"mode": "min"}, 0, 5),
        ([3, 2, 3, 3], {}, 0, 3),  # the earliest of equals
        ([NAN, NAN, 2, NAN, 1], {}, 2, 4),
        ([math.inf, 5, 4], {"mode": "min"}, 2, 2),
        # Stops after the second evaluation without gain
        ([1, 3, 2, 1, 9], {"patience": 2}, 1, 3),
        ([1, 3, 2, 4, 3, 4, 9], {"patience": 2}, 3, 5),
        # The best one by a little, which is no gain for the patience
        ([1.0, 1.1, 1.2, 9], {"patience": 2, "min_delta": 0.5}, 2, 2),
        ([1.0, 1.3, 1.6, 1.7, 9], {"patience": 2, "min_delta": 0.5}, 4, 4),
        ([5, 4, 4.5, 3.9, 1], {"patience": 2, "mode": "min", "min_delta": 0.2}, 3, 3),
        # Before the model detects anything there is nothing to lose
        ([NAN, NAN, NAN, 1, NAN, NAN, 9], {"patience": 2}, 3, 5),
        # The last evaluation ends the training anyway
        ([3, 2, 1], {"patience": 2}, 0, 2),
    ],
)
def test_which_checkpoint_is_kept_and_when_training_ends(results, options, best, last, tmp_path):
    trainer = Trainer(tmp_path, results, **options)
    is_early = trainer.train()
    assert is_early == (last < len(results) - 1)
    assert list(trainer.hook.history) == list(range(last + 1))
    weight, iteration, history = contents(tmp_path)
    assert weight == iteration == best == trainer.hook.best()[0]
    assert list(history) == list(range(best + 1))
    assert (tmp_path / "model_final.pth").exists() == is_early
    if is_early:
        assert trainer.max_iter == last + 1
        assert contents(tmp_path, "model_final")[1] == last
        assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
        again = Trainer(tmp_path, results, **options)
        assert again.train() and again.iter == last + 1
        more = Trainer(tmp_path, results, **{**options, "patience": 99})
        assert not more.train() and len(more.hook.history) == len(results)
    else:
        assert not (tmp_path / "last_checkpoint").exists()  # the best one is not the last one


def test_results_that_are_only_nan_keep_nothing(tmp_path):
    trainer = Trainer(tmp_path, [NAN] * 4, patience=2)
    assert not trainer.train() and trainer.hook.best() is None
    assert not list(tmp_path.iterdir())


def interrupted(folder, results, saved, until, **options):
    """A training that has saved the iteration `saved` before its evaluation, and went on."""
    trainer = Trainer(folder, results, **options)
    trainer.train(until=saved)
    trainer.iter = saved
    nn.init.constant_(trainer.model.weight, saved)
    trainer.checkpointer.save("model_0000000", iteration=saved)
    trainer.train(until=until)


def test_a_training_that_was_ahead_of_its_checkpoint_leaves_the_same_file(tmp_path):
    results = [2, 1, 5, 3, 4]
    (tmp_path / "whole").mkdir()
    Trainer(tmp_path / "whole", results).train()
    interrupted(tmp_path, results, saved=1, until=4)
    before = contents(tmp_path)
    assert before[:2] == (2, 2)
    resumed = Trainer(tmp_path, results)
    resumed.train(until=2)  # stops before it is as far
    assert contents(tmp_path) == before
    resumed = Trainer(tmp_path, results)
    resumed.train()
    assert contents(tmp_path) == contents(tmp_path / "whole") == before
    assert resumed.hook.best() == (2, 5)


def test_a_better_file_of_the_interrupted_training_stays_and_a_worse_one_does_not(tmp_path):
    """The repetition differs, for example with another number of processes."""
    for name, repeated, expected in [("less", 4, (2, 5)), ("more", 6, (3, 6))]:
        folder = tmp_path / name
        folder.mkdir()
        interrupted(folder, [2, 1, 5], saved=1, until=3)
        trainer = Trainer(folder, [2, 1, 3, repeated])
        trainer.train()
        assert trainer.hook.best() == expected
        assert contents(folder)[0] == expected[0]


def test_a_file_that_is_missing_or_damaged_does_not_make_a_worse_one_the_best(tmp_path, caplog):
    for name, damage in [("missing", None), ("damaged", b"PK\x03\x04 no more"), ("other", b"")]:
        folder = tmp_path / name
        folder.mkdir()
        interrupted(folder, [5, 1, 2], saved=1, until=2)
        (folder / "model_best.pth").unlink()
        if damage:
            (folder / "model_best.pth").write_bytes(damage)
        elif name == "other":
            torch.save(nn.Linear(1, 1, bias=False).state_dict(), folder / "model_best.pth")
        caplog.clear()
        Trainer(folder, [5, 1, 2, 3]).train()
        assert "lacks the best result" in caplog.text and "segm/AP 5, after iteration 0" in (
            caplog.text
        )
        Trainer(folder, [5, 1, 2, 3, 6]).train()
        assert contents(folder)[:2] == (4, 4)


def test_results_of_another_metric_do_not_count(tmp_path, caplog):
    interrupted(tmp_path, [5, 1, 2], saved=1, until=2)
    trainer = Trainer(tmp_path, [5, 3, 2, 1], mode="min")
    trainer.train()
    assert "(max)" in caplog.text
    assert trainer.hook.history == {1: 3, 2: 2, 3: 1}
    assert contents(tmp_path)[0] == 3


def test_without_a_metric_nothing_is_written(tmp_path):
    trainer = Trainer(tmp_path, [1, 2], val_metric="")
    assert not trainer.train()
    assert list(trainer.hook.history) == [0, 1] and not list(tmp_path.iterdir())


def test_a_result_that_does_not_exist(tmp_path, caplog):
    def update(name, results):
        trainer = SimpleNamespace(iter=0, max_iter=9)
        hook = BestCheckpointer(MaskScoringCheckpointer(nn.Linear(1, 1), str(tmp_path)), name)
        hook.trainer = trainer
        hook.update(results)
        return hook.history[0]

    results = {"segm": {"AP": 1.0, "AP-cat": 2.0}, "sem_seg": {"mIoU": 3.0}}
    for name in ("segm/APx", "sem_seg/mIou", "panoptic_seg/PQ", "AP"):
        with pytest.raises(UserError) as error:
            update(name, results)
        assert f"'{name}'" in str(error.value)
        assert "segm/AP, segm/AP-cat, sem_seg/mIoU" in str(error.value)
    # A model without detections has no results of masks
    assert math.isnan(update("segm/AP", {"bbox": {"AP": NAN}})) and "segm/AP" in caplog.text
    assert math.isnan(update("toy, val/segm/AP", {"toy, val": {"bbox": {"AP": NAN}}}))
    assert update("toy, val/segm/AP", {"toy, val": results}) == 1


def test_results_of_several_test_sets_have_their_names_in_front():
    def metric(path, *overrides):
        return build_recipe(load_config(model_zoo.get_config_file(path), overrides)).val_metric

    path = "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.yaml"
    both = "DATASETS.TEST=('coco_2017_val','coco_2014_val')"
    name = "SOLVER.BEST_CHECKPOINTER.VAL_METRIC"
    assert metric(path) == metric(path.replace("yaml", "py")) == "segm/AP"
    assert metric(path, both) == "coco_2017_val/segm/AP"
    assert metric(path, both, f"{name}=coco_2014_val/bbox/AP") == "coco_2014_val/bbox/AP"
    assert metric(path, both, f"{name}=validation/total_loss") == "validation/total_loss"
    assert metric(path, both, f"{name}=") == ""


@pytest.mark.parametrize(
    "metric, test_sets, is_known",
    [
        ("", ["a"], True),
        ("segm/AP75", ["a"], True),
        ("segm_by_class_score/AP", ["a"], True),
        ("segm/AP-cat", ["a"], True),
        ("bbox/AP@100", ["a"], True),
        ("mask_quality/mae", ["a"], True),
        ("keypoints/AP", ["a"], True),
        ("segm/mAP", ["a"], False),
        ("segm", ["a"], False),
        ("boundary/AP", ["a"], False),  # which is not computed
        ("b/bbox/AP", ["a", "b"], True),
        ("bbox/AP", ["a", "b"], False),
        ("c/bbox/AP", ["a", "b"], False),
    ],
)
def test_names_of_results_are_checked_before_training(metric, test_sets, is_known):
    evaluators = [COCOEvaluator.__new__(COCOEvaluator) for _ in test_sets]
    recipe = SimpleNamespace(val_metric=metric, test_sets=test_sets)
    with nullcontext() if is_known else pytest.raises(UserError, match=f"'{metric}'"):
        check_metric(recipe, evaluators)
    check_metric(recipe, [object() for _ in test_sets])  # of the user's own


# ---- trainings that are killed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """All that concerns evaluations, which come after each second iteration; saved each third."""
    folder = tmp_path_factory.mktemp("base")
    config, dataset = write_lazy_config(folder / "lazy.yaml"), write_dataset(folder)
    options = ["train.max_iter=12", "train.checkpointer.period=3", "train.eval_period=2"]
    options += ["train.early_stopping.patience=2"]
    options += ["train.model_ema.enabled=True", "train.model_ema.decay=0.9"]
    options += ["train.accumulation_steps=2"]
    options += ["train.validation_loss.enabled=True", "train.validation_loss.num_images=2"]
    return ["--resume", "--config-file", config, *dataset, *options]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    training = Training([*base, f"train.output_dir={folder}/output"], folder, ("evaluate_weights",))
    assert training.exit_code() == 0, training.printed()[-3000:]
    return folder / "output"


def results_in(output):
    """{iteration: what the evaluation after it has found}; later ones count."""
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return {
        m["iteration"]: {k: v for k, v in m.items() if k.startswith(("segm/", "validation/"))}
        for m in lines
        if "segm/AP" in m
    }


def same(one, other):
    """Whether two checkpoints are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def assert_same_output(output, whole):
    assert results_in(output) == results_in(whole)
    for name in ("model_best.pth", "model_final.pth"):
        assert same(torch.load(output / name), torch.load(whole / name)), name
    assert (output / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(
    "moment, count",
    [
        ("evaluation", 3),  # after the checkpoint of the same iteration
        ("signal", 4),  # after which the training would have stopped
        ("written", 2),
        ("saved", 1),  # before there is another checkpoint
    ],
)
def test_a_killed_training_ends_with_the_same_best_checkpoint(moment, count, base, whole, tmp_path):
    output = tmp_path / "output"
    options = [*base, f"train.output_dir={output}"]
    killed = Training(options, tmp_path, prepare=("evaluate_weights", moment, count))
    expected = 128 + signal.SIGTERM if moment == "signal" else -signal.SIGKILL
    assert killed.exit_code() == expected, killed.printed()[-3000:]
    resumed = Training(options, tmp_path, prepare=("evaluate_weights",))
    assert resumed.exit_code() == 0, resumed.printed()[-3000:]
    assert_same_output(output, whole)
    assert not list(output.glob("*.incomplete"))


def test_a_training_that_has_stopped_early_has_nothing_left_to_do(base, whole, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(whole, output)
    again = Training([*base, f"train.output_dir={output}"], tmp_path, ("evaluate_weights",))
    assert again.exit_code() == 0
    assert "has stopped early, after iteration 7" in again.printed()
    assert not again.losses()
    assert_same_output(output, whole)


def test_the_training_stops_early_and_says_so(whole):
    results = results_in(whole)
    assert list(results) == [1, 3, 5, 7]
    assert all("validation/loss_mask_iou" in result for result in results.values())
    best = max(results, key=lambda k: results[k]["segm/AP"])
    contents = torch.load(whole / "model_best.pth")
    assert best == 3 == contents["iteration"]
    # The evaluation was that of the averages
    for key, is_evaluated in [("ema_state", True), ("model", False)]:
        ap = 20 + ap_of(contents[key])
        assert (ap == pytest.approx(results[3]["segm/AP"])) == is_evaluated
    log = (whole / "log.txt").read_text()
    assert "The training stops early" in log
    assert re.search(r"Best segm/AP: [\d.]+, after iteration 3: '.*model_best.pth'", log)
    numbered = {path.name for path in whole.glob("model_0*")}
    assert numbered == {"model_0000002.pth", "model_0000005.pth"}
