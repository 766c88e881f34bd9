"""From what a file contains to parameters with Detectron2's names, order of classes and values."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.layers import FrozenBatchNorm2d

from ..utils.errors import UserError
from . import names
from .reading import read_file

__all__ = ["Weights", "check_finite", "read_weights"]


# Mean and standard deviation of each channel, in the order of the model's input
Pixels = tuple[list[float], list[float]]


@dataclass
class Weights:
    """
    Parameters under Detectron2's names.

    Attributes:
        source: who named them in the file, such as "MMDetection".
        state_dict: tensors by name; buffers such as the statistics of batch norm are among them.
        extras: what else the file has, such as the state of an optimizer; only from files whose
            names are Detectron2's.
        matched_by_suffix: whether the names are to be matched to the ends of a model's, as
            Detectron2 does with weights of backbones; `state_dict` has the file's own names then.
        pixels: by which images were normalised in training, where it is known.
        note: what a user of such a file should know.
        class_names: in the order of the classes, if the file has them.
    """

    source: str
    state_dict: dict[str, torch.Tensor]
    extras: dict[str, Any]
    matched_by_suffix: bool = False
    pixels: Pixels | None = None
    note: str = ""
    class_names: list[str] | None = None


@dataclass(frozen=True)
class _Source:
    """
    Attributes:
        marks: parameter names of this source, and of no source further down in `SOURCES`, match.
        table: from :mod:`names`.
        dropped: names that match have no counterpart in a detector.
        background_first: background is class 0; in Detectron2 it is the last one.
        coco_ids: whether a model of 91 classes has COCO's, numbered with gaps.
        eps_of_frozen_bn: whether batch norm adds a small number to the variance, as in
            Detectron2.
    """

    name: str
    marks: str
    table: Mapping[str, str]
    dropped: str = r"$^"
    background_first: bool = False
    coco_ids: bool = False
    eps_of_frozen_bn: bool = True
    pixels: Pixels | None = None
    note: str = ""


# COCO's categories have numbers with gaps, from 1 to 90, which torchvision's own detectors keep
COCO_IDS = [c["id"] for c in COCO_CATEGORIES if c["isthing"]]
NUM_COCO_IDS = 91

# Of Detectron2's older versions; they follow from the config
DERIVED = re.compile(r"(.*\.)?anchor_generator\.cell_anchors\.\d+|pixel_(mean|std)")

IMAGENET_RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])

SOURCES = [
    _Source(
        "Detectron2's names, with a maskiou_head",
        marks=r"roi_heads\.maskiou_head\.",
        table=names.MASKIOU_HEAD,
        dropped=rf"({DERIVED.pattern})$",
    ),
    _Source(
        "the paper's maskrcnn-benchmark",
        marks=r"roi_heads\.(box|mask|maskiou)\.(feature_extractor|predictor)\.",
        table=names.MASKRCNN_BENCHMARK,
        dropped=r"rpn\.anchor_generator\.cell_anchors\.",
        background_first=True,
        eps_of_frozen_bn=False,
        pixels=([102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]),
        note=(
            "It was trained with boxes of inclusive pixel coordinates and an unaligned RoIAlign: "
            "results differ slightly from those of the original code."
        ),
    ),
    _Source(
        "torchvision's detectors",
        marks=r"backbone\.(body|fpn\.inner_blocks)\.|roi_heads\.mask_predictor\.",
        table=names.TORCHVISION_DETECTOR,
        background_first=True,
        coco_ids=True,
        eps_of_frozen_bn=False,  # in the published weights, so in what was fine-tuned from them
        pixels=IMAGENET_RGB,
        note=(
            "It was trained with RGB images, strides in the 3x3 convolutions and an unaligned "
            "RoIAlign: the config has to say the first two, and results differ slightly from those "
            "of torchvision. If it has 91 classes, the 80 that COCO really has are taken."
        ),
    ),
    _Source(
        "MMDetection",
        marks=r"(neck|rpn_head|roi_head)\.|backbone\.(conv1|layer1)\.",
        table=names.MMDETECTION,
        # Of a classifier; and what MMCV's EMA keeps besides, which saves the averages as weights
        dropped=r"head\.fc\.|ema_\w+$",
    ),
    _Source(
        "torchvision",
        marks=r"fc\.weight$",
        table=names.TORCHVISION_RESNET,
        dropped=r"fc\.",
        pixels=IMAGENET_RGB,
    ),
    # Others use the names as well, MMDetection also for weights that come from Caffe
    _Source(
        "torchvision's names",
        marks=r"layer1\.0\.conv1\.",
        table=names.TORCHVISION_RESNET,
    ),
]

# Under which key files have their parameters, and whose parameters those then are if Detectron2
# has to match them to the ends of a model's names
WRAPPERS = {
    "model": None,
    "state_dict": None,
    "model_state_dict": None,
    "module": None,
    "model_state": "pycls",
    "blobs": "Caffe2",
}
MAX_NESTED = 5  # of them, one in another
# Under which key they have averages of the parameters
AVERAGES = (
    "ema",
    "ema_state_dict",
    "model_ema",
    "ema_model",
    "ema_state",
    "model_ema_state_dict",
    "state_dict_ema",
)
# How names begin if a model was a part of another module
PREFIX = re.compile(
    rf"(?P<averages>{'|'.join(AVERAGES)})\.|module\.|model\.|state_dict\.|model_state_dict\."
)
# What compiling, sharding and checkpointing put into the middle of names as well
INNER = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# What PyTorch's AveragedModel keeps beside the weights: how many it has averaged
NUM_AVERAGED = "n_averaged"
# A counter that only batch norm in training would use, and then only with momentum=None
COUNTER = "num_batches_tracked"
# A setting that MaskIoUHead keeps with its weights; only files of this package have it
SCORE_EXPONENT = "roi_heads.mask_iou_head.score_exponent"


def read_weights(file: str) -> Weights:
    """
    Args:
        file: path of a file, as in :func:`read_file`.

    Returns:
        the weights in it.

    Raises:
        UserError: it cannot be read, or has no weights.
    """
    contents = read_file(file)
    found, extras, averages = _find_weights(contents)
    _check(found, file)
    if extras.pop("matching_heuristics", False):
        return Weights(str(extras.get("__author__", "Detectron2")), found, extras, True)
    found, prefixed_averages = _without_prefixes(found, file)
    weights = _with_names_of_detectron2(found, extras)
    weights.class_names = _class_names(extras, weights.state_dict)
    weights.note = " ".join(filter(None, (weights.note, averages or prefixed_averages)))
    return weights


def _with_names_of_detectron2(found: "OrderedDict[str, torch.Tensor]", extras: dict) -> Weights:
    for source in SOURCES:
        if any(re.match(source.marks, name) for name in found):
            return _from_source(source, found, extras)
    _remove(found, DERIVED.fullmatch)
    return Weights("Detectron2", found, extras)


def _without_prefixes(
    found: "OrderedDict[str, torch.Tensor]", file: str
) -> "tuple[OrderedDict[str, torch.Tensor], str]":
    """
    Parameters without what wrappers put before their names, nested ones too; if there are averages
    of them as well, only the parameters; and a sentence about that.
    """
    plain: OrderedDict[str, torch.Tensor] = OrderedDict()
    averages: OrderedDict[str, torch.Tensor] = OrderedDict()
    originals: dict[str, str] = {}
    for name, value in found.items():
        bare, averaged_by = _without_prefix(name)
        if bare == NUM_AVERAGED:
            continue
        target = averages if averaged_by else plain
        if bare in target:
            raise UserError(
                f"'{file}' has two sets of weights: '{originals[bare]}' and '{name}' are the same "
                "parameter. Save the state_dict() of the one model that is meant."
            )
        target[bare] = value
        if target is plain or bare not in plain:
            originals[bare] = name
    metadata = getattr(found, "_metadata", {})
    renamed = {_without_prefix(f"{k}.")[0].rstrip("."): v for k, v in metadata.items()}
    note = ""
    if averages:
        prefix = _without_prefix(next(n for n in found if _without_prefix(n)[1]))[1]
        if averages.keys() & plain.keys():
            note = _about_averages(f"{prefix}.", taken=False)
        else:
            plain.update(averages)
            note = _about_averages(f"{prefix}.", taken=True)
    plain._metadata = renamed  # type: ignore[attr-defined]
    return plain, note


def _without_prefix(name: str) -> tuple[str, str]:
    """A name without prefixes, and the one of them that says that it is an average, or ""."""
    name, averaged_by = INNER.sub("", name), ""
    while True:
        match = PREFIX.match(name)
        if not match:
            return name, averaged_by
        name, averaged_by = name[match.end() :], averaged_by or match["averages"] or ""


def _about_averages(key: str, taken: bool) -> str:
    if taken:
        return f"The file has averaged weights (EMA) only, as '{key}': those are taken."
    return f"The file also has averaged weights (EMA), as '{key}': they are not taken."


def _class_names(
    extras: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> list[str] | None:
    """Names in a file of this package or of MMDetection, if they are as many as its classes."""
    meta = _plain(extras.get("meta"))
    dataset_meta = _plain(meta.get("dataset_meta"))  # since version 3
    candidates = (
        extras.get(CLASS_NAMES),
        meta.get("CLASSES"),
        dataset_meta.get("classes"),
        dataset_meta.get("CLASSES"),
    )
    names = next((x for x in candidates if isinstance(x, (list, tuple, str)) and x), None)
    if names is None:
        return None
    names = [names] if isinstance(names, str) else list(names)
    numbers = {len(v) - 1 for k, v in state_dict.items() if CLASS_BIAS.fullmatch(k) and v.ndim == 1}
    is_theirs = all(type(name) is str for name in names) and numbers <= {len(names)}
    return names if is_theirs else None


def check_finite(state_dict: Mapping[str, torch.Tensor], file: str) -> None:
    """
    Raises:
        UserError: a parameter has a value that is NaN or infinite; it names the parameters.
    """
    numbers = {k: v for k, v in state_dict.items() if v.is_floating_point() and k != SCORE_EXPONENT}
    wrong = [name for name, value in numbers.items() if not value.float().isfinite().all()]
    if not wrong:
        return
    value = state_dict[wrong[0]].float()
    count = int((~value.isfinite()).sum())
    kind = "NaN" if value.isnan().any() else "infinite"
    more = f", and so do {len(wrong) - 1} more parameters" if len(wrong) > 1 else ""
    raise UserError(
        f"'{file}' cannot be used: '{wrong[0]}' has values that are {kind} ({count} of "
        f"{value.numel()}){more}. The training that wrote it has failed before: take an earlier "
        "checkpoint of it."
    )


def _check(found: Mapping[str, Any], file: str) -> None:
    """Whether all are tensors of numbers, which a model can copy."""
    # A name that is damaged can hold the end of a line
    wrong = [f"{_kind(value)} as {name!r}" for name, value in found.items() if _kind(value)]
    if wrong or not found:
        what = wrong[0] if wrong else "none"
        raise UserError(
            f"'{file}' is no checkpoint: where parameters are expected, as from saving "
            f'{{"model": model.state_dict()}}, it has {what}.'
        )


def _kind(value: Any) -> str:
    """What a value is that is no parameter, or ""."""
    if isinstance(value, np.ndarray):
        return f"an array of type {value.dtype}"
    if not isinstance(value, torch.Tensor):
        return f"a value of type {type(value).__name__}"
    if value.is_quantized or value.is_complex():
        return f"a tensor of {value.dtype}"
    if value.layout != torch.strided or value.is_meta:
        return "a tensor without values" if value.is_meta else f"a tensor of {value.layout}"
    return ""


def _find_weights(contents: Any) -> "tuple[OrderedDict[str, Any], dict[str, Any], str]":
    """The parameters, what the file has besides, and a sentence about averages of them."""
    values: Any = contents
    extras: dict[str, Any] = {}
    note, author = "", None
    for _ in range(MAX_NESTED):  # a file can have a dict that contains itself
        items = _plain(values)
        key = next((k for k in WRAPPERS if isinstance(items.get(k), dict)), None)
        averages = next((k for k in AVERAGES if isinstance(items.get(k), dict)), None)
        if averages:
            note = _about_averages(averages, taken=key is None)
        inner = key or averages
        if inner is None:
            break
        # What is nested more deeply has less to say
        extras = {**{k: v for k, v in items.items() if k not in (inner, averages)}, **extras}
        values, author = items[inner], author or WRAPPERS.get(inner)
    if values is contents and any(isinstance(v, np.ndarray) for v in items.values()):
        author = "Caffe2"
    return _tensors(values), {**extras, **_matching(author)}, note


def _matching(author: str | None) -> dict[str, Any]:
    return {"__author__": author, "matching_heuristics": True} if author else {}


def _plain(values: Any) -> dict:
    """The items of a dict. A file can put anything in the place of an OrderedDict's methods."""
    return dict(dict.items(values)) if isinstance(values, dict) else {}


def _tensors(values: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """The same parameters, arrays as tensors, without the momentum that Caffe2 keeps with them."""
    tensors = OrderedDict(
        (str(name), _tensor(value))
        for name, value in _plain(values).items()
        if not str(name).endswith("_momentum")
    )
    # Versions of modules, by which they mend old checkpoints
    metadata = _plain(getattr(values, "_metadata", None))
    tensors._metadata = {  # type: ignore[attr-defined]
        str(k): dict(v)
        for k, v in metadata.items()
        if type(v) is dict and isinstance(v.get("version"), int)
    }
    return tensors


def _tensor(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.Tensor.detach(value)  # without the attributes that a file can give it
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.itemsize <= 8:
        # A copy: arrays in pickles are read-only. PyTorch knows the machine's order of bytes only
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    return value


def _remove(found: dict[str, torch.Tensor], unwanted: Callable) -> None:
    for name in [name for name in found if unwanted(name)]:
        del found[name]


def _from_source(source: _Source, found: dict[str, torch.Tensor], extras: dict) -> Weights:
    translate = names.compile_names(source.table)
    _remove(found, lambda name: name.endswith(COUNTER) or re.match(source.dropped, name))
    state_dict = {translate(name) or name: value for name, value in found.items()}
    if source.background_first:
        state_dict = _with_background_last(state_dict, source.coco_ids)
    if not source.eps_of_frozen_bn:
        state_dict = {k: _compensated_for_eps(k, v) for k, v in state_dict.items()}
    pixels = source.pixels or _pixels_of_mmdetection(extras.get("meta"))
    return Weights(source.name, state_dict, {}, pixels=pixels, note=source.note)


CLASS_NAMES = "class_names"  # the key in files of this package
CLASS_BIAS = re.compile(r"roi_heads\.box_predictor(\.\d+)?\.cls_score\.bias")
CLASS_SCORE = "roi_heads.box_predictor.cls_score."
# Number of rows for each class
CLASS_ROWS = {
    CLASS_SCORE: 1,
    "roi_heads.box_predictor.bbox_pred.": 4,
    "roi_heads.mask_head.predictor.": 1,
    "roi_heads.mask_iou_head.predictor.": 1,
}


def _with_background_last(
    state_dict: dict[str, torch.Tensor], coco_ids: bool
) -> dict[str, torch.Tensor]:
    """Move class 0, the background, behind the others; all but the class scores do without it."""
    if CLASS_SCORE + "bias" not in state_dict:
        return state_dict  # a part of a detector
    num_classes = len(state_dict[CLASS_SCORE + "bias"])
    has_gaps = coco_ids and num_classes == NUM_COCO_IDS
    foreground = COCO_IDS if has_gaps else list(range(1, num_classes))
    reordered = {}
    for name, value in state_dict.items():
        rows = next((n for prefix, n in CLASS_ROWS.items() if name.startswith(prefix)), None)
        if rows and len(value) == rows * num_classes:  # not a class-agnostic one
            chosen = [*foreground, 0] if name.startswith(CLASS_SCORE) else foreground
            value = value.unflatten(0, (num_classes, rows))[chosen].flatten(0, 1)
        reordered[name] = value
    return reordered


def _compensated_for_eps(name: str, value: torch.Tensor) -> torch.Tensor:
    """Detectron2 adds a small number to a variance; without it the outputs are the original's."""
    if not name.endswith(".norm.running_var"):
        return value
    return value - FrozenBatchNorm2d(1).eps


def _pixels_of_mmdetection(meta: Any) -> Pixels | None:
    """MMDetection keeps the text of the config, version 2 as "config", version 3 as "cfg"."""
    meta = _plain(meta)
    text = str(meta.get("config") or meta.get("cfg") or "")
    mean, std = (re.search(rf"\b{key}=\[([-\d.,\s]+)\]", text) for key in ("mean", "std"))
    if not (mean and std):
        return None
    return _numbers(mean[1]), _numbers(std[1])


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number.strip()]
