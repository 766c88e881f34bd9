"""What makes models faster leaves what they compute as it is."""

import copy
import pickle

import pytest
import torch

from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from msrcnn_d2.modeling.acceleration import (
    channels_last_on_cpu,
    compile_dense_parts,
    use_channels_last_on_cpu,
)
from tests.helpers.toy import CHANNELS, tiny_mask_rcnn, tiny_mask_scoring_rcnn, toy_inputs


def convolutions(model):
    return [x for x in model.parameters() if x.dim() == 4 and min(x.shape) > 1]


def is_channels_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last)


def assert_close(outputs, expected):
    """Up to rounding: all the same detections, in the same order."""
    for output, other in zip(outputs, expected, strict=True):
        output, other = output["instances"], other["instances"]
        assert len(output) == len(other) > 0
        assert torch.equal(output.pred_classes, other.pred_classes)
        torch.testing.assert_close(output.pred_boxes.tensor, other.pred_boxes.tensor)
        for name in ("scores", "pred_mask_ious", "mask_scores"):
            torch.testing.assert_close(output.get(name), other.get(name))
        assert (output.pred_masks != other.pred_masks).float().mean() < 1e-4


def test_weights_are_channels_last_within_the_block_only(tiny):
    before = {name: x.clone() for name, x in tiny.state_dict().items()}
    strides = [x.stride() for x in tiny.parameters()]
    parameters = list(tiny.parameters())
    with pytest.raises(KeyError):
        with channels_last_on_cpu(tiny):
            assert all(map(is_channels_last, convolutions(tiny)))
            raise KeyError
    assert not any(map(is_channels_last, convolutions(tiny)))
    assert [x.stride() for x in tiny.parameters()] == strides
    assert all(a is b for a, b in zip(tiny.parameters(), parameters))  # an optimizer's still
    assert all(torch.equal(x, before[name]) for name, x in tiny.state_dict().items())


@torch.no_grad()
def test_channels_last_changes_no_detection(tiny):
    inputs = toy_inputs()
    expected = tiny.eval()(inputs)
    with channels_last_on_cpu(tiny):
        assert_close(tiny(inputs), expected)


def test_a_model_that_is_not_on_a_cpu_is_left_alone(tiny):
    tiny = tiny.to("meta")
    with channels_last_on_cpu(tiny):
        assert not any(map(is_channels_last, convolutions(tiny)))
    assert not use_channels_last_on_cpu(tiny)


@pytest.mark.parametrize("cascade", [False, True], ids=["standard", "cascade"])
def test_parts_are_compiled_under_their_old_names(cascade):
    model = instantiate(tiny_mask_scoring_rcnn(cascade).model)
    names = list(model.state_dict())
    compile_dense_parts(model)
    assert list(model.state_dict()) == names
    heads = model.roi_heads
    box_heads = list(heads.box_head) if cascade else [heads.box_head]
    for part in (model.backbone, model.proposal_generator.rpn_head, *box_heads):
        assert part._compiled_call_impl is not None
    for head in (heads.mask_head, heads.mask_iou_head):
        assert "layers" in vars(head)


def test_a_mask_rcnn_is_compiled_too():
    model = instantiate(tiny_mask_rcnn().model)
    compile_dense_parts(model)
    assert "layers" in vars(model.roi_heads.mask_head)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_a_copy_of_a_compiled_model_has_weights_of_its_own(copied, tiny):
    compile_dense_parts(tiny.eval(), backend="eager")
    head = copied(tiny).roi_heads.mask_iou_head
    features, masks = torch.rand(2, CHANNELS, 14, 14), torch.rand(2, 1, 28, 28)
    torch.nn.init.constant_(head.predictor.weight, 0)
    torch.nn.init.constant_(head.predictor.bias, 3)
    assert (head.layers(features, masks) == 3).all()
    assert not (tiny.roi_heads.mask_iou_head.layers(features, masks) == 3).any()


def test_a_compiled_model_trains_and_predicts_the_same(tiny):
    # The parts as torch.compile traces them; generating code for them as well takes minutes
    inputs, state = toy_inputs(), copy.deepcopy(tiny.state_dict())

    def losses_gradients_and_outputs():
        tiny.load_state_dict(state)  # batch norm has changed its statistics
        torch.manual_seed(0)
        with EventStorage():
            losses = tiny.train()(inputs)
        tiny.zero_grad()
        sum(losses.values()).backward()
        gradients = {k: x.grad.clone() for k, x in tiny.named_parameters() if x.requires_grad}
        with torch.no_grad():
            outputs = [x["instances"] for x in tiny.eval()(inputs)]
        fields = [getattr(v, "tensor", v) for x in outputs for v in x.get_fields().values()]
        return {**losses, **gradients, **dict(enumerate(fields))}

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    expected = losses_gradients_and_outputs()
    compile_dense_parts(tiny, backend=backend)
    found = losses_gradients_and_outputs()
    # Backbone, RPN head and the three heads, in training and in evaluation
    assert len(graphs) >= 10
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@torch.no_grad()
def test_heads_are_compiled_for_few_numbers_of_regions(tiny):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_dense_parts(tiny.eval(), backend=backend)
    heads = tiny.roi_heads

    def compiled_for(count):
        """How many graphs the box, mask and mask IoU head add for a number of regions."""
        features, masks = torch.rand(count, CHANNELS, 14, 14), torch.rand(count, 1, 28, 28)
        before = len(graphs)
        heads.box_head(torch.rand(count, CHANNELS, 7, 7))
        heads.mask_head.layers(features)
        heads.mask_iou_head.layers(features, masks)
        return len(graphs) - before

    assert compiled_for(20) == 3
    assert [compiled_for(count) for count in (16, 17, 100, 512)] == [0] * 4
    assert compiled_for(15) <= 2  # the convolutions of a CPU
    assert [compiled_for(count) for count in (2, 3, 14, 30, 200)] == [0] * 5
    assert compiled_for(1) <= 3 and compiled_for(0) <= 3
    assert [compiled_for(count) for count in (1, 0, 2, 15, 16, 300)] == [0] * 6
