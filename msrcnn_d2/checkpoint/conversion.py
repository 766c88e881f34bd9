"""From what a file contains to parameters with Detectron2's names, order of classes and values."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detectron2.layers import FrozenBatchNorm2d

from ..utils.errors import UserError
from .reading import read_file
from .sources import COCO_IDS, DERIVED, NUM_COCO_IDS, SOURCES, Pixels

__all__ = ["Weights", "check_finite", "read_weights"]

# Files have their parameters under one of these keys. A value says whose they are, if Detectron2
# has to match their names to the ends of a model's names
WRAPPERS = {
    "model": None,
    "state_dict": None,
    "model_state_dict": None,
    "module": None,
    "model_state": "pycls",
    "blobs": "Caffe2",
}
MAX_NESTED = 5  # wrappers in one another
# Averages of the parameters (EMA) in files of this package, detrex and d2go. They have the names
# of the parameters, and stand beside those that a training resumes from
EMA_STATE = "ema_state"
# Files have averages of the parameters under one of these keys
AVERAGES = (
    "ema",
    "ema_state_dict",
    "model_ema",
    "ema_model",
    EMA_STATE,
    "model_ema_state_dict",
    "state_dict_ema",
)
# How names begin if the model was a part of another module
PREFIX = re.compile(
    rf"(?P<averages>{'|'.join(AVERAGES)})\.|module\.|model\.|state_dict\.|model_state_dict\."
)
# What compiling, sharding and checkpointing put anywhere into names
INNER = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# PyTorch's AveragedModel counts here how many models it has averaged
NUM_AVERAGED = "n_averaged"
# A counter that only batch norm in training would use, and only with momentum=None
COUNTER = "num_batches_tracked"
# Files of version 0.1 have it: masks were ranked by class score x predicted IoU ** exponent
SCORE_EXPONENT = "roi_heads.mask_iou_head.score_exponent"
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


@dataclass
class Weights:
    """
    Parameters under Detectron2's names.

    Attributes:
        source: who named them in the file, such as "MMDetection".
        state_dict: tensors by name, among them buffers such as the statistics of batch norm.
        extras: what else the file has, such as the state of an optimizer; only from files with
            Detectron2's names.
        matched_by_suffix: whether the names have to be matched to the ends of a model's names, as
            Detectron2 does for weights of backbones. `state_dict` then has the file's own names.
        pixels: how images were normalised in training, if that is known.
        note: what a user of the file should know.
        averaged: whether the parameters are the averages (EMA) in a file that has both.
        class_names: in the order of the classes, if the file has them.
    """

    source: str
    state_dict: dict[str, torch.Tensor]
    extras: dict[str, Any]
    matched_by_suffix: bool = False
    pixels: Pixels | None = None
    note: str = ""
    class_names: list[str] | None = None
    averaged: bool = False

    @property
    def origin(self) -> str:
        """For messages: who named the parameters, and whether they are averages."""
        return f"{self.source}, averages (EMA)" if self.averaged else self.source


def read_weights(file: str, averages: bool = True) -> Weights:
    """
    Args:
        file: path of a file, as in :func:`read_file`.
        averages: whether to take the averages in `EMA_STATE` where the file has them.

    Returns:
        the weights in it, with `SCORE_EXPONENT` only if that is not 1.

    Raises:
        UserError: the file cannot be read, or has no weights.
    """
    found, extras, note = _find_weights(read_file(file))
    ema_state = _plain(extras.pop(EMA_STATE, None)) if averages else {}
    # It may lack parameters that were frozen, and has buffers that are not saved otherwise
    averaged = {k: _tensor(v) for k, v in ema_state.items() if k in found}
    found.update(averaged)
    _check_parameters(found, file)
    if extras.pop("matching_heuristics", False):
        return Weights(str(extras.get("__author__", "Detectron2")), found, extras, True)
    found, note_on_prefixes = _without_prefixes(found, file)
    weights = _renamed(found, extras)
    weights.class_names = _class_names(extras, weights.state_dict)
    exponent = weights.state_dict.get(SCORE_EXPONENT)
    if exponent is not None and torch.allclose(exponent.float(), torch.ones(()), 1e-6, 0):
        del weights.state_dict[SCORE_EXPONENT]  # as masks are ranked now
    weights.note = " ".join(filter(None, (weights.note, note or note_on_prefixes)))
    weights.averaged = bool(averaged)
    return weights


def _find_weights(contents: Any) -> "tuple[OrderedDict[str, Any], dict[str, Any], str]":
    """The parameters, the other contents of the file, and a note on averaged weights."""
    values: Any = contents
    extras: dict[str, Any] = {}
    note, author = "", None
    for _ in range(MAX_NESTED):  # a file can have a dict that contains itself
        items = _plain(values)
        key = next((k for k in WRAPPERS if isinstance(items.get(k), dict)), None)
        averages = next((k for k in AVERAGES if isinstance(items.get(k), dict)), None)
        inner = key or averages
        if inner is None:
            break
        left_out = {inner}
        if averages and (averages, key) != (EMA_STATE, "model"):
            note = _note_on_averages(averages, taken=key is None)
            left_out.add(averages)
        # An outer value wins over an inner one of the same name
        extras = {**{k: v for k, v in items.items() if k not in left_out}, **extras}
        values, author = items[inner], author or WRAPPERS.get(inner)
    if values is contents and any(isinstance(v, np.ndarray) for v in items.values()):
        author = "Caffe2"
    if author:
        extras.update(__author__=author, matching_heuristics=True)

    tensors = OrderedDict(
        (str(name), _tensor(value))
        for name, value in _plain(values).items()
        if not str(name).endswith("_momentum")  # of the optimizer, in files of Caffe2
    )
    # Versions of modules, which tell them how to read old checkpoints
    metadata = _plain(getattr(values, "_metadata", None))
    tensors._metadata = {  # type: ignore[attr-defined]
        str(k): dict(v)
        for k, v in metadata.items()
        if type(v) is dict and isinstance(v.get("version"), int)
    }
    return tensors, extras, note


def _plain(values: Any) -> dict:
    """The items of a dict. A file can replace an OrderedDict's own methods by anything."""
    return dict(dict.items(values)) if isinstance(values, dict) else {}


def _tensor(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.Tensor.detach(value)  # without the attributes that a file can give it
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.itemsize <= 8:
        # A copy, since arrays in pickles are read-only, in the only byte order that PyTorch takes
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    return value


def _note_on_averages(key: str, taken: bool) -> str:
    if taken:
        return f"The file has averaged weights (EMA) only, as '{key}': those are taken."
    return f"The file also has averaged weights (EMA), as '{key}': they are not taken."


def _check_parameters(found: Mapping[str, Any], file: str) -> None:
    """Refuse what is not a tensor of numbers that a model can copy."""
    wrong = "" if found else "none"
    for name, value in found.items():
        kind = _kind_of_other(value)
        if kind and not wrong:
            wrong = f"{kind} as {name!r}"  # quoted, as a damaged name can have several lines
    if wrong:
        raise UserError(
            f"'{file}' is no checkpoint: where parameters are expected, as from saving "
            f'{{"model": model.state_dict()}}, it has {wrong}.'
        )


def _kind_of_other(value: Any) -> str:
    """What a value is if it is not a parameter, or ""."""
    if isinstance(value, np.ndarray):
        return f"an array of type {value.dtype}"
    if not isinstance(value, torch.Tensor):
        return f"a value of type {type(value).__name__}"
    if value.is_quantized or value.is_complex():
        return f"a tensor of {value.dtype}"
    if value.layout != torch.strided or value.is_meta:
        return "a tensor without values" if value.is_meta else f"a tensor of {value.layout}"
    return ""


def _without_prefixes(
    found: "OrderedDict[str, torch.Tensor]", file: str
) -> "tuple[OrderedDict[str, torch.Tensor], str]":
    """
    Remove what wrappers put before names, also several of them. If there are parameters and
    averages of them, only the parameters are taken.

    Returns:
        the parameters, and a note on averages.
    """
    originals: dict[tuple[str, bool], str] = {}
    averages_key = ""
    for name in found:
        bare, averaged_by = _without_prefix(name)
        if bare == NUM_AVERAGED:
            continue
        if (bare, bool(averaged_by)) in originals:
            raise UserError(
                f"'{file}' has two sets of weights: '{originals[bare, bool(averaged_by)]}' and "
                f"'{name}' are the same parameter. Save the state_dict() of one model only."
            )
        originals[bare, bool(averaged_by)] = name
        averages_key = averages_key or averaged_by
    plain = OrderedDict((bare, found[n]) for (bare, average), n in originals.items() if not average)
    averages = {bare: found[n] for (bare, average), n in originals.items() if average}
    note = ""
    if averages:
        taken = not averages.keys() & plain.keys()
        note = _note_on_averages(f"{averages_key}.", taken)
        if taken:
            plain.update(averages)
    metadata = getattr(found, "_metadata", {})
    renamed = {_without_prefix(f"{k}.")[0].rstrip("."): v for k, v in metadata.items()}
    plain._metadata = renamed  # type: ignore[attr-defined]
    return plain, note


def _without_prefix(name: str) -> tuple[str, str]:
    """The name without prefixes, and the prefix that says that it is an average, or ""."""
    name, averaged_by = INNER.sub("", name), ""
    while match := PREFIX.match(name):
        name, averaged_by = name[match.end() :], averaged_by or match["averages"] or ""
    return name, averaged_by


def _renamed(found: "OrderedDict[str, torch.Tensor]", extras: dict[str, Any]) -> Weights:
    """The parameters with the names, the order of classes and the values of Detectron2."""
    source = next((s for s in SOURCES if any(re.match(s.marks, name) for name in found)), None)
    if source is None:
        for name in [name for name in found if DERIVED.fullmatch(name)]:
            del found[name]  # in place: a copy would not have the versions of modules
        return Weights("Detectron2", found, extras)
    state_dict = {
        source.renamed(name): value
        for name, value in found.items()
        if not (name.endswith(COUNTER) or re.match(source.dropped, name))
    }
    if source.background_first:
        state_dict = _with_background_last(state_dict, source.coco_ids)
    if not source.eps_of_frozen_bn:
        # Detectron2 adds a small number to each variance. Without it outputs are the original's
        eps = FrozenBatchNorm2d(1).eps
        for name in [name for name in state_dict if name.endswith(".norm.running_var")]:
            state_dict[name] = state_dict[name] - eps
    pixels = source.pixels or _pixels_of_mmdetection(extras.get("meta"))
    return Weights(source.name, state_dict, {}, pixels=pixels, note=source.note)


def _with_background_last(
    state_dict: dict[str, torch.Tensor], coco_ids: bool
) -> dict[str, torch.Tensor]:
    """Move class 0, the background, to the end of the class scores; remove it everywhere else."""
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


def _pixels_of_mmdetection(meta: Any) -> Pixels | None:
    """From the text of the config, which MMDetection 2 keeps as "config" and 3 as "cfg"."""
    meta = _plain(meta)
    text = str(meta.get("config") or meta.get("cfg") or "")
    found = (re.search(rf"\b{key}=\[([-\d.,\s]+)\]", text) for key in ("mean", "std"))
    mean, std = ([float(x) for x in m[1].split(",") if x.strip()] if m else None for m in found)
    return (mean, std) if mean is not None and std is not None else None


def _class_names(
    extras: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> list[str] | None:
    """The names in a file of this package or of MMDetection, if there is one for each class."""
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
        UserError: a parameter has a value that is NaN or infinite; the message names it.
    """
    numbers = {k: v for k, v in state_dict.items() if v.is_floating_point()}
    wrong = [name for name, value in numbers.items() if not value.float().isfinite().all()]
    if not wrong:
        return
    value = state_dict[wrong[0]].float()
    count = int((~value.isfinite()).sum())
    kind = "NaN" if value.isnan().any() else "infinite"
    more = f", and so do {len(wrong) - 1} more parameters" if len(wrong) > 1 else ""
    raise UserError(
        f"'{file}' cannot be used: '{wrong[0]}' has values that are {kind} ({count} of "
        f"{value.numel()}){more}. The training that wrote it had failed before: take an earlier "
        "checkpoint."
    )
