"""Freezing by names of parameters."""

import pytest
import torch
from torch import nn

from msrcnn_d2.engine.freezing import freeze
from msrcnn_d2.utils.errors import UserError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.Sequential(nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1))
        self.backbone_of_head = nn.Linear(1, 1)

    def forward(self, x):
        return self.head(self.backbone(x))


def frozen(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    "patterns, expected",
    [
        ([], set()),
        ([r"backbone\."], {"backbone.0.weight", "backbone.0.bias"}),
        (
            ["backbone", r".*\.0\.bias"],
            {"backbone.0.weight", "backbone.0.bias", "head.0.bias"}
            | {"backbone_of_head.weight", "backbone_of_head.bias"},
        ),
    ],
)
def test_patterns_match_the_beginning_of_names(patterns, expected):
    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    freeze(model, patterns)
    assert frozen(model) == expected  # a frozen batch norm has no parameters
    after = model.state_dict()
    for name in set(before) - {"backbone.1.num_batches_tracked"}:
        assert torch.equal(before[name], after[name]), name


def test_a_frozen_batch_norm_neither_learns_nor_counts():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 1, 3, 3)
    model(x)  # statistics that are not those of the next batch
    freeze(model, [r"backbone\."])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model.eval().backbone(2 * x).detach()
    assert torch.allclose(model.train().backbone(2 * x), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(2 * x).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith("backbone.") for name in changed)
    assert {"head.0.weight", "head.1.running_mean"} <= changed


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="'bakbone'.*backbone, head"):
        freeze(Model(), ["head", "bakbone"])
    with pytest.raises(UserError, match="no parameter to train"):
        freeze(Model(), ["."])
