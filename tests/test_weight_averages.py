"""Moving averages of weights: by hand, and in whole trainings."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.engine.weight_averages import PreciseBNOfAverages, WeightAverages
from msrcnn_d2.utils.errors import UserError
from tests.helpers.command import exit_code, leaving_no_traces
from tests.helpers.toy_training import run, write_dataset, write_lazy_config


class Model(nn.Module):
    """A trained and a frozen parameter; buffers with a number, a counter and one not saved."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([1.0]))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)
        self.register_buffer("mean", torch.tensor([10.0]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("unsaved", torch.tensor([7.0]), persistent=False)

    def become(self, trained, mean, count):
        with torch.no_grad():
            self.trained.fill_(trained)
            self.mean.fill_(mean)
            self.count.fill_(count)


def averaged(device=""):
    """With decay 0.75, after two iterations."""
    model = Model()
    averages = WeightAverages(model, 0.75, device)
    averages.start()
    for values in [(3, 20, 4), (-1, 0, 9)]:
        model.become(*values)
        averages.update()
    return model, averages


def numbers(state_dict):
    return {name: value.item() for name, value in state_dict.items()}


# 1 -> 0.75 * 1 + 0.25 * 3 = 1.5 -> 0.75 * 1.5 - 0.25 = 0.875
# 10 -> 0.75 * 10 + 0.25 * 20 = 12.5 -> 0.75 * 12.5 = 9.375
AVERAGES = {"trained": 0.875, "frozen": 5, "mean": 9.375, "count": 9, "unsaved": 7}
OWN = {"trained": -1, "frozen": 5, "mean": 0, "count": 9}


@pytest.mark.parametrize("device", ["", "cpu"])
def test_averages_by_hand(device):
    model, averages = averaged(device)
    state_dict = averages.state_dict()
    assert numbers(state_dict) == AVERAGES and numbers(model.state_dict()) == OWN
    assert state_dict["frozen"].data_ptr() == model.frozen.data_ptr()  # takes no memory


def test_the_model_has_them_in_the_block_only():
    model, averages = averaged()
    with pytest.raises(KeyboardInterrupt), averages.applied():
        assert numbers(model.state_dict()) == {k: v for k, v in AVERAGES.items() if k != "unsaved"}
        raise KeyboardInterrupt
    assert numbers(model.state_dict()) == OWN
    with averages.applied():
        averages.restore()  # as before a checkpoint in the midst of an evaluation
        assert numbers(model.state_dict()) == OWN
        assert numbers(averages.state_dict()) == AVERAGES


def test_averages_go_on_where_they_were_saved():
    model, averages = averaged()
    resumed = WeightAverages(model, 0.75)
    resumed.load_state_dict({k: v.clone() for k, v in averages.state_dict().items()})
    resumed.start()
    for x in (averages, resumed):
        model.become(2, 1, 10)
        x.update()
        assert numbers(x.state_dict())["trained"] == 0.75 * 0.875 + 0.25 * 2
    for wrong in (torch.ones(2), "text"):
        with pytest.raises(ValueError, match="trained"):
            resumed.load_state_dict({"trained": wrong})


def test_what_is_unfrozen_later_is_averaged_from_then_on():
    model, averages = averaged()
    with torch.no_grad():
        model.frozen.requires_grad_(True).fill_(6)
        averages.update()
        assert numbers(averages.state_dict())["frozen"] == 6
        model.frozen.fill_(10)
        averages.update()
    assert numbers(averages.state_dict())["frozen"] == 0.75 * 6 + 0.25 * 10


def test_precise_batch_norm_has_the_statistics_of_the_averages():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    nn.init.constant_(model[0].weight, 2)
    averages = WeightAverages(model, 1.0)
    averages.start()
    nn.init.constant_(model[0].weight, 7)
    batches = [torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])]
    hook = PreciseBNOfAverages(averages, 0, model, batches, 2)
    hook.trainer = SimpleNamespace(iter=4, max_iter=5)
    hook.after_step()
    # Of 0, 2, 4 and 6
    found = averages.state_dict()
    assert (found["1.running_mean"].item(), found["1.running_var"].item()) == (3, 5)
    assert found["0.weight"].item() == 2
    own = model.state_dict()
    assert (own["0.weight"].item(), own["1.running_mean"].item()) == (7, 0)


def test_a_file_gives_averages_to_what_predicts_and_weights_to_what_resumes(tmp_path):
    model, averages = averaged()
    MaskScoringCheckpointer(model, str(tmp_path), ema_state=averages).save("model_0000001")
    file = str(tmp_path / "model_0000001.pth")

    def loaded(strict=True, **kwargs):
        fresh = Model()
        MaskScoringCheckpointer(fresh, str(tmp_path), **kwargs).load(file, strict=strict)
        return numbers(fresh.state_dict())

    predicting = {k: v for k, v in AVERAGES.items() if k != "unsaved"}
    assert loaded() == loaded(strict=False) == predicting
    assert loaded(takes_averages=False) == OWN
    fresh = Model()
    resumed = WeightAverages(fresh, 0.75)
    checkpointer = MaskScoringCheckpointer(fresh, str(tmp_path), ema_state=resumed)
    checkpointer.resume_or_load("", resume=True)
    assert numbers(fresh.state_dict()) == OWN
    resumed.start()
    assert numbers(resumed.state_dict()) == AVERAGES
    # A new training that starts from the file takes its averages
    checkpointer.resume_or_load(file, resume=False)
    assert numbers(fresh.state_dict()) == predicting
    # d2go can leave out what is frozen
    contents = torch.load(file)
    contents["ema_state"] = {"trained": contents["ema_state"]["trained"]}
    torch.save(contents, file)
    assert loaded() == {**OWN, "trained": 0.875}
    contents["ema_state"]["trained"] = "text"
    torch.save(contents, file)
    with pytest.raises(UserError, match="text|str"):
        loaded()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The options and the output folder of a training with averages."""
    folder = tmp_path_factory.mktemp("averages")
    (folder / "data").mkdir()
    options = ["--config-file", write_lazy_config(folder / "lazy.yaml")]
    options += write_dataset(folder / "data")
    averages = ["train.model_ema.enabled=True", "train.model_ema.decay=0.5", "optimizer.lr=0.01"]
    with leaving_no_traces():
        run(*options, *averages, f"train.output_dir={folder / 'output'}")
    return options, folder / "output"


def scores(output):
    return [x["score"] for x in json.loads((output / "inference" / RESULTS).read_text())]


RESULTS = "coco_segm_results.json"


@pytest.mark.usefixtures("leave_no_traces")
def test_the_evaluation_of_a_training_is_that_of_its_file(trained, tmp_path):
    options, output = trained
    file = output / "model_final.pth"
    contents = torch.load(file)
    weights, averages = contents["model"], contents["ema_state"]
    assert set(weights) < set(averages)
    name = "roi_heads.mask_iou_head.predictor.weight"
    assert not torch.equal(weights[name], averages[name])
    expected = scores(output)
    assert len(expected) > 5

    def evaluated(number, *more, weights=file):
        again = [f"train.output_dir={tmp_path / str(number)}", *more]
        assert exit_code("evaluate", *options, "--weights", weights, *again) == 0
        return scores(tmp_path / str(number))

    assert evaluated(1) == expected  # without a word of averages in the config
    raw = evaluated(2, "train.model_ema.use_ema_weights_for_eval_only=False")
    assert len(raw) != len(expected) or raw != expected
    # For other programs
    assert exit_code("convert", file, tmp_path / "plain.pth") == 0
    plain = torch.load(tmp_path / "plain.pth")["model"]
    assert torch.equal(plain[name], averages[name])
