"""The benchmarks' arithmetic; what they measure is measured by `make bench`."""

import sys

import pytest
import torch

from detectron2.config import instantiate

from benchmarks import evaluation, measuring, memory, memory_simulated, tiles
from benchmarks.memory_simulated import GB, ShapesOnly, peak_of_training
from benchmarks.models import model_input, random_boxes
from benchmarks.report import Part, Target
from benchmarks.synthetic_coco import draw_dataset
from benchmarks.training import training_input
from msrcnn_d2 import published_models
from tests.helpers.simulated_cuda import SimulatedCuda, SimulatedTensor
from tests.helpers.toy import tiny_mask_scoring_rcnn


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


def test_memory_is_measured_for_images_of_the_published_size():
    inputs = training_input(0, memory.SIZE)
    assert inputs["image"].shape == (3, 800, 1333)
    assert inputs["instances"].image_size == (800, 1333)


# ---- simulated memory


def test_simulated_memory_of_a_layer():
    KB = 1024
    device = ShapesOnly()
    with device.running():
        weight = torch.nn.Parameter(device.empty(256, 256))
        x = device.empty(64, 256)
        assert device.live == (256 + 64) * KB
        device.peak = device.live
        loss = (x @ weight).relu().sum()
        assert loss.value.is_meta
        # The product is gone; what relu() returned waits for the backward pass
        assert device.live == (256 + 64 + 64) * KB + 512
        assert device.peak == (256 + 64 + 2 * 64) * KB
        loss.backward()
        assert device.live == (256 + 64 + 256) * KB + 512
        # The gradients of the product and of the weight, and the loss and its gradient
        assert device.peak == (256 + 64 + 64 + 256) * KB + 2 * 512
        assert weight.grad.shape == (256, 256) and weight.grad.value.is_meta
        del loss
        weight.grad = None
        assert device.live == (256 + 64) * KB


def test_what_is_known_keeps_its_value_beside_shapes():
    device = ShapesOnly()
    with device.running():
        unknown, known = device.empty(4, 3), torch.tensor([True, False, True, True]).cuda()
        assert unknown[known].shape == (3, 3)
        assert known.sum().item() == 3
        assert unknown[:, 0].sum().item() == 0 and unknown.nonzero().shape == (0, 2)
        assert unknown.cpu().tolist() == [[0.0] * 3] * 4
        filled = torch.zeros(4, 3, device="cuda")
        filled[known] = unknown[known]
        assert isinstance(filled, SimulatedTensor) and filled.value.is_meta


@pytest.mark.parametrize("amp", [False, True])
def test_memory_of_shapes_is_that_of_values(amp):
    def build():
        return instantiate(tiny_mask_scoring_rcnn().model)

    with_values = SimulatedCuda(track_memory=True)
    expected = peak_of_training(build, amp, (64, 96), with_values)
    assert peak_of_training(build, amp, (64, 96)) == expected > 2**20


def test_simulated_memory_stands_beside_published_numbers(monkeypatch):
    built = []

    def peak(build, amp=False):
        build()
        kind, name = built.pop()
        return (2 if kind == "theirs" else 3 - amp) * GB

    monkeypatch.setattr(memory_simulated, "peak_of_training", peak)
    for name, kind in (("detectron2_model", "theirs"), ("our_model", "ours")):
        monkeypatch.setattr(memory_simulated, name, lambda x, kind=kind: built.append((kind, x)))
    calibration, part = memory_simulated.run(None)
    assert [row[1:3] for row in calibration.rows] == [[2, 3.4], [2, 4.6], [2, 7.2]]
    assert [row[3] for row in calibration.rows] == pytest.approx([1.4, 2.6, 5.2])
    assert [row[0] for row in part.rows] == list(memory.NAMES)
    assert [row[1:] for row in part.rows] == [
        [3, "4.4 to 8.2", 2, published_models.PUBLISHED[name].memory] for name in memory.NAMES
    ]
    assert [row[4] for row in part.rows] == [4.5, 6.5, 7.9, 11.0]


def test_both_engines_are_timed_on_the_same_work():
    dataset, results = draw_dataset(3)
    assert len(results) == 300 and len(dataset["images"]) == 3
    timings = evaluation.time_evaluation(dataset, results, evaluation.ALL_TASKS, rounds=1)
    assert [len(t.seconds) for t in timings] == [1, 1]  # it asserts that the numbers agree


def test_boundary_ap_is_timed_on_the_same_work():
    timings = evaluation.time_boundary_ap(*draw_dataset(2), rounds=1)
    assert [len(t.seconds) for t in timings.values()] == [1, 1, 1]  # it asserts that they agree


def test_without_sahi_tiles_are_measured_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "sahi", None)
    monkeypatch.setattr(tiles, "SIZE", 256)
    monkeypatch.setattr(tiles, "SETTINGS", [(128, 0.2, 2)])
    (part,) = tiles.run(None)
    assert {row[0] for row in part.rows} == {tiles.OURS} and not part.targets
    assert part.rows[0][-1] > 0
    assert any("pip install" in note for note in part.notes)
