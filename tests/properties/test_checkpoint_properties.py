"""What holds for files of weights, whoever wrote or damaged them."""

import functools
import io
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st

from msrcnn_d2.checkpoint.conversion import Weights, read_weights
from msrcnn_d2.checkpoint.reading import NotWeightsError, read_file
from msrcnn_d2.checkpoint.writing import WRITERS, write_weights
from msrcnn_d2.utils.errors import UserError
from tests.helpers.strategies import Untouched, holds, same, seeds
from tests.helpers.weights import (
    BODY,
    BOXES,
    HEADS,
    IOUS,
    MASKS,
    MMDETECTION,
    PAPER,
    SCORES,
    arrays,
    renamed,
    slim_model,
    torch_bytes,
    with_background_first,
)

EPS = 1e-5  # what Detectron2 adds to the variances of frozen batch norm, and others do not

DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]


def in_folder(function):
    """Calls it with an empty folder, one for each case."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with tempfile.TemporaryDirectory() as folder:
            return function(*args, folder=Path(folder), **kwargs)

    del wrapper.__wrapped__  # the folder is no fixture
    return wrapper


@functools.cache
def names_of_parameters():
    return sorted(slim_model().state_dict())


@st.composite
def tensors(draw, rows=None):
    """Any small tensor: of any number of dimensions if `rows` are not given, NaN and all."""
    shape = [draw(st.integers(0, 3)) for _ in range(draw(st.integers(0, 3)))]
    if rows is not None:
        shape = [rows, *shape]
    rng = np.random.default_rng(draw(seeds()))
    values = rng.choice([0.0, -0.0, 1.5, np.nan, np.inf, -np.inf, 1e-30, 70000.0], shape)
    mixed = np.where(rng.random(shape) < 0.7, rng.normal(size=shape), values)
    return torch.from_numpy(np.asarray(mixed)).to(draw(st.sampled_from(DTYPES)))


@st.composite
def state_dicts(draw, always=(), norms=True):
    """
    Some parameters of a Mask Scoring R-CNN with any values, for some number of classes.

    Args:
        always: names that it has in any case.
        norms: whether the variances of batch norm may be among them.
    """
    names = names_of_parameters()
    # A ResNet has most of the names
    rare = st.sampled_from([name for name in names if not name.startswith(BODY)])
    chosen = draw(st.lists(st.one_of(st.sampled_from(names), rare), max_size=12, unique=True))
    num_classes = draw(st.integers(1, 5))
    agnostic = draw(st.booleans()) and num_classes > 1
    state_dict = {}
    for name in dict.fromkeys([*always, *chosen]):
        if not norms and name.endswith("running_var"):
            continue
        rows = None
        if name.startswith(SCORES):
            rows = num_classes + 1
        elif name.startswith(BOXES):
            rows = 4 if agnostic else 4 * num_classes
        elif name.startswith((MASKS, IOUS)):
            rows = 1 if agnostic and name.startswith(MASKS) else num_classes
        state_dict[name] = draw(tensors(rows))
    return state_dict


def with_background_first_unless_agnostic(state_dict):
    """Class-agnostic rows have no background."""
    count = len(state_dict[SCORES + "bias"]) - 1
    rows = {BOXES: 4, MASKS: 1, IOUS: 1}
    plain = {
        name: value
        for name, value in state_dict.items()
        for prefix, number in rows.items()
        if name.startswith(prefix) and len(value) != number * count
    }
    return {**with_background_first(state_dict), **plain}


# A file of each kind, from the same parameters
FORMS = {
    "zip": lambda x: torch_bytes(x),
    "legacy": lambda x: torch_bytes(x, zipped=False),
    "in a model": lambda x: torch_bytes({"model": x, "iteration": 7}),
    "ordered": lambda x: torch_bytes({"state_dict": OrderedDict(x)}),
    "of several processes": lambda x: torch_bytes({f"module.{k}": v for k, v in x.items()}),
    "safetensors": lambda x: safetensors.torch.save(
        {k: v.contiguous().clone() for k, v in x.items()}
    ),
}


def read_back(state_dict, form, folder):
    """The weights of a file; reading leaves the file as it is."""
    file = folder / "weights"
    file.write_bytes(FORMS[form](state_dict))
    before = file.read_bytes()
    weights = read_weights(str(file))
    assert file.read_bytes() == before
    return weights


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same(found[name], value), name


ALWAYS_MMDETECTION = ["backbone.fpn_lateral2.weight"]
OF_CLASSES = [SCORES + "bias", BOXES + "bias", MASKS + "bias"]
ALWAYS_PAPER = [*OF_CLASSES, IOUS + "bias", HEADS + "mask_iou_head.fcs.fc1.weight"]


@holds(
    15,
    state_dict=state_dicts(ALWAYS_MMDETECTION),
    form=st.sampled_from(sorted(FORMS)),
)
@in_folder
def test_to_mmdetections_names_and_back_is_the_identity(state_dict, form, folder):
    untouched = Untouched(state_dict)
    weights = read_back(renamed(state_dict, MMDETECTION), form, folder)

    assert weights.source == "MMDetection"
    assert_equal(weights.state_dict, state_dict)
    untouched.check()


def with_lower_variances(state_dict):
    """Those of batch norm, less by what Detectron2 adds to them."""
    return {
        name: value - EPS if name.endswith("norm.running_var") else value
        for name, value in state_dict.items()
    }


@holds(15, state_dict=state_dicts(ALWAYS_PAPER), form=st.sampled_from(sorted(FORMS)))
@in_folder
def test_to_the_papers_names_and_back_is_the_identity(state_dict, form, folder):
    """But for the variances of batch norm, which are less by what Detectron2 adds to them."""
    theirs = renamed(with_background_first_unless_agnostic(state_dict), PAPER, "backbone.body.")
    weights = read_back(theirs, form, folder)

    assert weights.source == "the paper's maskrcnn-benchmark"
    assert_equal(weights.state_dict, with_lower_variances(state_dict))


def torchvision_names(state_dict):
    """Of torchvision's Mask R-CNN, which has no mask IoU head; ours says the same with letters."""
    heads = {
        **{f"backbone.fpn_lateral{i + 2}.": f"backbone.fpn.inner_blocks.{i}.0." for i in range(4)},
        **{f"backbone.fpn_output{i + 2}.": f"backbone.fpn.layer_blocks.{i}.0." for i in range(4)},
        "proposal_generator.rpn_head.conv.": "rpn.head.conv.0.0.",
        "proposal_generator.rpn_head.objectness_logits.": "rpn.head.cls_logits.",
        "proposal_generator.rpn_head.anchor_deltas.": "rpn.head.bbox_pred.",
        HEADS + "box_head.fc1.": "roi_heads.box_head.fc6.",
        HEADS + "box_head.fc2.": "roi_heads.box_head.fc7.",
        SCORES: "roi_heads.box_predictor.cls_score.",
        BOXES: "roi_heads.box_predictor.bbox_pred.",
        **{f"{HEADS}mask_head.mask_fcn{i + 1}.": f"roi_heads.mask_head.{i}.0." for i in range(4)},
        HEADS + "mask_head.deconv.": "roi_heads.mask_predictor.conv5_mask.",
        MASKS: "roi_heads.mask_predictor.mask_fcn_logits.",
    }
    return renamed(state_dict, heads, "backbone.body.")


@holds(
    15,
    state_dict=state_dicts([*OF_CLASSES, "backbone.fpn_lateral3.bias"]),
    form=st.sampled_from(sorted(FORMS)),
)
@in_folder
def test_to_torchvisions_names_and_back_is_the_identity(state_dict, form, folder):
    state_dict = {k: v for k, v in state_dict.items() if "mask_iou_head" not in k}
    theirs = torchvision_names(with_background_first_unless_agnostic(state_dict))
    weights = read_back(theirs, form, folder)

    assert weights.source == "torchvision's detectors"
    assert_equal(weights.state_dict, with_lower_variances(state_dict))


@holds(15, state_dict=state_dicts([SCORES + "bias"]), form=st.sampled_from(sorted(FORMS)))
@in_folder
def test_our_own_names_stay(state_dict, form, folder):
    weights = read_back(state_dict, form, folder)

    assert weights.source == "Detectron2" and not weights.matched_by_suffix
    assert_equal(weights.state_dict, state_dict)


@holds(15, state_dict=state_dicts([SCORES + "bias"]), suffix=st.sampled_from(sorted(WRITERS)))
@in_folder
def test_what_is_written_is_read_and_not_modified(state_dict, suffix, folder):
    untouched = Untouched(state_dict)
    file = str(folder / f"weights{suffix}")

    write_weights(state_dict, file)

    untouched.check()
    assert_equal(read_weights(file).state_dict, state_dict)


@holds(15, state_dict=state_dicts([SCORES + "bias"]), protocol=st.integers(2, 5))
@in_folder
def test_arrays_of_detectron2s_pickles_are_tensors(state_dict, protocol, folder):
    state_dict = {k: v.float() for k, v in state_dict.items()}  # NumPy has no bfloat16
    contents = {"model": arrays(state_dict), "__author__": "someone"}
    (folder / "x.pkl").write_bytes(pickle.dumps(contents, protocol))

    weights = read_weights(str(folder / "x.pkl"))

    assert_equal(weights.state_dict, state_dict)


# ---- damaged files

SMALL = {"backbone.conv1.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2).half()}


@functools.cache
def whole_file(form):
    if form == "pickle":
        return pickle.dumps({"model": arrays(SMALL), "matching_heuristics": True}, 2)
    if form == "old pickle":
        return pickle.dumps(arrays(SMALL), 0)
    if form == "MMEngine":
        buffer = io.BytesIO()
        torch.save(
            {"meta": {"epoch": 3}, "state_dict": SMALL, "optimizer": [1, (2.5, "x")]}, buffer
        )
        return buffer.getvalue()
    return FORMS[form](SMALL)


KINDS = ["zip", "legacy", "in a model", "safetensors", "pickle", "old pickle", "MMEngine"]


@st.composite
def damaged_files(draw):
    """A file that is cut off, or of which bytes are changed, left out, repeated or added."""
    data = bytearray(whole_file(draw(st.sampled_from(KINDS))))
    places = st.integers(0, len(data) - 1)
    # Where formats have their heads and their tables; between lie values mostly
    places = st.one_of(places, st.integers(0, min(300, len(data) - 1)))
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        kind = draw(st.sampled_from(["flip", "flip", "byte", "cut", "drop", "repeat", "add"]))
        start = min(draw(places), len(data) - 1)
        stop = start + draw(st.integers(1, 40))
        if kind == "flip":
            data[start] ^= 1 << draw(st.integers(0, 7))
        if kind == "byte":
            data[start] = draw(st.integers(0, 255))
        if kind == "cut":
            del data[start:]
        if kind == "drop":
            del data[start:stop]
        if kind == "repeat":
            data[start:start] = data[start:stop]
        if kind == "add":
            data[start:start] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


def assert_weights_or_refused(data, folder):
    file = folder / "weights"
    file.write_bytes(data)
    try:
        read_file(str(file))
    except NotWeightsError as error:
        assert error.what
    try:
        weights = read_weights(str(file))
    except UserError as error:
        message = str(error)
        assert str(file) in message and message.endswith(".") and "\n" not in message
    else:
        assert isinstance(weights, Weights) and weights.state_dict
        for name, value in weights.state_dict.items():
            assert type(name) is str and type(value) is torch.Tensor
            value.clone()  # its memory is there
    assert file.read_bytes() == data


@holds(60, data=damaged_files())
@in_folder
def test_a_damaged_file_has_weights_or_is_refused(data, folder):
    assert_weights_or_refused(data, folder)


@holds(25, data=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(b"\x80\x02".__add__)))
@in_folder
def test_any_bytes_are_weights_or_refused(data, folder):
    assert_weights_or_refused(data, folder)


PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(list(SMALL.values())),
    ),
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers()), x, max_size=3),
        st.dictionaries(st.sampled_from(["model", "state_dict", "meta", "a"]), x, max_size=3),
        st.tuples(x, x),
    ),
    max_leaves=8,
)


@holds(25, contents=PLAIN, zipped=st.booleans(), as_pickle=st.booleans())
@in_folder
def test_any_contents_are_weights_or_refused(contents, zipped, as_pickle, folder):
    if as_pickle:
        data = pickle.dumps(as_arrays(contents))
    else:
        data = torch_bytes(contents, zipped)
    assert_weights_or_refused(data, folder)


def as_arrays(thing):
    if isinstance(thing, torch.Tensor):
        return thing.numpy()
    if isinstance(thing, dict):
        return {k: as_arrays(v) for k, v in thing.items()}
    return type(thing)(map(as_arrays, thing)) if isinstance(thing, (list, tuple)) else thing
