"""The benchmarks' arithmetic; what they measure is measured by `make bench`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import evaluation
import measuring
from models import model_input, random_boxes
from report import Part, Target
from synthetic_coco import draw_dataset


def test_ratios_are_taken_within_rounds():
    # The machine was slow in the last round, for both
    ours, theirs = measuring.Timing([1.0, 2.0, 30.0]), measuring.Timing([2.0, 4.0, 40.0])
    assert ours.ratio_to(theirs) == 0.5
    assert ours.as_dict() == {"median": 2.0, "min": 1.0, "max": 30.0, "rounds": 3}


def test_functions_take_turns_in_alternating_order():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measuring.time_in_turn(functions, rounds=2)
    assert calls in (["a", "b", "b", "a", "a", "b"], ["b", "a", "a", "b", "b", "a"])
    assert [len(t.seconds) for t in timings.values()] == [2, 2]


def test_steps_add_up_to_the_total():
    def run(watch):
        watch("one", sum, [1])
        assert watch("two", max, 3, 4) == 4
        watch("one", sum, [2])

    timings = measuring.time_steps_in_turn({"run": run}, rounds=3, warm_up=False)["run"]
    assert list(timings) == ["one", "two", "total"]
    for k in range(3):
        one, two, total = (t.seconds[k] for t in timings.values())
        assert total == pytest.approx(one + two)


def test_peak_memory_of_a_tensor():
    size = 64 * 2**20  # bytes
    assert 60 < measuring.peak_memory(lambda: torch.ones(size, dtype=torch.uint8)) < 100


def test_targets_say_whether_they_are_met():
    assert str(Target("ratio", 1.2, 1.1)) == "ratio: 1.2, to be at most 1.1: NOT met"
    assert str(Target("speed-up", 3.0, 3, at_least=True)).endswith("at least 3: met")
    part = Part("Title", ["a"], [[1.5]], targets=[Target("ratio", 1.0, 1.1)])
    assert "### Title" in str(part) and "1.5" in str(part)
    assert part.as_dict()["targets"][0]["met"] is True


def test_inputs_are_a_photograph_and_boxes_within_it():
    image = model_input(160)["image"]
    assert image.shape == (3, 213, 160) and image.std() > 20
    boxes = random_boxes(500, (213, 160))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([160, 213])).all()
    assert torch.equal(boxes, random_boxes(500, (213, 160)))


def test_both_engines_are_timed_on_the_same_work():
    dataset, results = draw_dataset(3)
    assert len(results) == 300 and len(dataset["images"]) == 3
    timings = evaluation.time_evaluation(dataset, results, evaluation.ALL_TASKS, rounds=1)
    assert [len(t.seconds) for t in timings] == [1, 1]  # it asserts that the numbers agree
