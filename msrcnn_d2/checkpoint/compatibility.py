"""Whether the parameters of a file fit a model, and a message if they do not."""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from msrcnn_d2_runtime.text import listed, plural

from .conversion import CLASS_BIAS, COUNTER, SCORE_EXPONENT

__all__ = [
    "MASK_IOU_HEAD",
    "Fit",
    "compare",
    "frozen_class_scores",
    "frozen_parameters",
    "misfit",
    "summary",
]

BACKBONE = "backbone.bottom_up."
MASK_IOU_HEAD = "roi_heads.mask_iou_head."
MASK_CALIBRATOR = "roi_heads.mask_calibrator."
OTHER_MODEL = "The config describes another model."


@dataclass
class Fit:
    """
    The parameters of a file compared with those of a model; persistent buffers count as well.

    Attributes:
        total: number of the model's parameters.
        given: names of the model's parameters that come from the file.
        missing: names of the model's parameters that the file lacks.
        unexpected: names in the file that the model lacks.
        shapes: {name: (shape in the file, shape in the model)} where they differ.
        types: {name: (type in the file, type in the model)} where one is of integers and the
            other of floating-point numbers: loading would convert them as if they meant the same.
    """

    total: int
    given: list[str]
    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple, tuple]]
    types: dict[str, tuple[torch.dtype, torch.dtype]]

    @property
    def num_classes(self) -> tuple[int, int] | None:
        """The numbers of classes in the file and in the model, if they differ."""
        for name, (given, expected) in self.shapes.items():
            if CLASS_BIAS.fullmatch(name):
                return given[0] - 1, expected[0] - 1  # one row is the background's
        return None


def compare(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> Fit:
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith(COUNTER)}
    given = {k: v for k, v in state_dict.items() if not k.endswith(COUNTER)}
    both = {k: (given[k], v) for k, v in expected.items() if k in given}
    return Fit(
        total=len(expected),
        given=[k for k, (a, b) in both.items() if a.shape == b.shape],
        missing=[k for k in expected if k not in given],
        unexpected=[k for k in given if k not in expected],
        shapes={
            k: (tuple(a.shape), tuple(b.shape)) for k, (a, b) in both.items() if a.shape != b.shape
        },
        types={
            k: (a.dtype, b.dtype)
            for k, (a, b) in both.items()
            if a.is_floating_point() != b.is_floating_point()
        },
    )


def frozen_parameters(model: nn.Module) -> set[str]:
    """
    Names of the parameters that training leaves as they are, and of the buffers of modules without
    other parameters, such as a frozen batch norm.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        fixed = [name for name, p in parameters.items() if not p.requires_grad]
        if len(fixed) == len(parameters):
            fixed += dict(module.named_buffers(recurse=False))
        names.update(f"{prefix}.{name}".lstrip(".") for name in fixed)
    return names


def frozen_class_scores(model: nn.Module) -> bool:
    """Whether training leaves the class scores as they are."""
    model = getattr(model, "module", model)  # of one that is trained in parallel
    return any(CLASS_BIAS.fullmatch(name) for name in frozen_parameters(model))


def misfit(fit: Fit, needed: Collection[str] | None = None) -> str:
    """
    Args:
        needed: names of the parameters that have to come from the file. A training needs the
            frozen ones only. None for an evaluation, which needs all of them and allows no
            others.

    Returns:
        why a model cannot be used with these weights; or "".
    """
    if not fit.given and not fit.shapes:
        return _names_differ(fit)
    if fit.types:
        name, types = next(iter(fit.types.items()))
        return (
            f"'{name}' is of type {types[0]} in the file and {types[1]} in the model, as in a "
            "quantised model. Give the weights as floating-point numbers."
        )
    # If nothing else fits, the shapes that differ say why
    if any(not fit.given or needed is None or name in needed for name in fit.shapes):
        return _shapes_differ(fit)
    if SCORE_EXPONENT in fit.unexpected and any(k.startswith(MASK_IOU_HEAD) for k in fit.given):
        return (
            f"'{SCORE_EXPONENT}' is not 1, and masks are ranked by class score x predicted IoU, "
            "which is no longer raised to an exponent. `msrcnn-d2 convert` writes a copy without "
            "the exponent and with the same weights."
        )
    missing = [name for name in fit.missing if needed is None or name in needed]
    if missing:
        return _parameters_missing(fit, missing, needed is not None)
    # A retrofitted or calibrated Mask R-CNN is still a Mask R-CNN
    unexpected = [k for k in fit.unexpected if not k.startswith((MASK_IOU_HEAD, MASK_CALIBRATOR))]
    if unexpected and needed is None:
        return f"the model has no {listed(unexpected)}. {OTHER_MODEL}"
    return ""


def _names_differ(fit: Fit) -> str:
    missing = set(fit.missing)
    for name in fit.unexpected:
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in missing:
                return (
                    f"its names begin with '{name[: dot.end()]}', which is not known here. Save "
                    "the state_dict() of the model itself, without what is wrapped around it."
                )
    ends = {name[dot.end() :] for name in missing for dot in re.finditer(r"\.", name)}
    if sum(name in ends for name in fit.unexpected) > len(fit.unexpected) / 2:
        return (
            "its names are the ends of the model's, as in a file of a backbone alone. Append "
            "?matching_heuristics=True to the file's name to train from it."
        )
    return (
        "it has none of the model's parameters. It belongs to another kind of model, or its names "
        "are not known here."
    )


def _shapes_differ(fit: Fit) -> str:
    if fit.num_classes:
        number, expected = fit.num_classes
        return (
            f"it has {plural(number, 'class', 'classes')}, the model {expected}. Set "
            f"model.roi_heads.num_classes={number} (yaml: MODEL.ROI_HEADS.NUM_CLASSES {number})."
        )
    name, shapes = next(iter(fit.shapes.items()))
    more = f", and {len(fit.shapes) - 1} more differ" if len(fit.shapes) > 1 else ""
    return (
        f"'{name}' has shape {shapes[0]} in the file and {shapes[1]} in the model{more}. "
        f"{OTHER_MODEL}"
    )


def _parameters_missing(fit: Fit, missing: list[str], training: bool) -> str:
    if all(name.startswith(MASK_CALIBRATOR) for name in missing):
        return (
            "it has no calibrator, which the model of the config has. A calibrator is fitted to a "
            "trained model: run `msrcnn-d2 calibrate` and use the config that it writes, or use "
            "the config that the model had before for a model without a calibrator."
        )
    if not training and all(name.startswith(MASK_IOU_HEAD) for name in missing):
        return (
            "it is a plain Mask R-CNN, so the mask IoU head has no weights "
            f"({listed(missing)}). Train that head alone, which leaves boxes, classes and "
            "masks as they are: msrcnn-d2 train --retrofit (see projects/retrofit). To evaluate "
            "the Mask R-CNN as it is, use its own config."
        )
    is_backbone = all(name.startswith(BACKBONE) for name in fit.given)
    if is_backbone and not missing[0].startswith(BACKBONE):
        return (
            "it has the weights of a backbone only, to start a training from, but not "
            f"{listed(fit.missing)}. Give the checkpoint of a whole model."
        )
    if training:
        return (
            f"it does not provide {listed(missing)}, which training does not change, so they would "
            f"stay random. {OTHER_MODEL}"
        )
    where, instead = "", ""
    unexpected = [k for k in fit.unexpected if not k.startswith(MASK_IOU_HEAD)]
    if len(missing) > 3:
        where = f" (in {', '.join(_modules(missing))})"
        instead = f", but has {', '.join(_modules(unexpected))}" if unexpected else ""
    return f"it does not provide {listed(missing)}{where}{instead}. {OTHER_MODEL}"


def _modules(names: Collection[str]) -> list[str]:
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def summary(fit: Fit, file: str, source: str) -> str:
    text = f"{len(fit.given)} of {fit.total} parameters from '{file}' ({source})"
    fresh = _modules([*fit.missing, *fit.shapes])
    if not fresh:
        return text + "."
    why = ""
    if fit.num_classes:
        number, expected = fit.num_classes
        why = f" (the file has {plural(number, 'class', 'classes')}, the model {expected})"
    return f"{text}. Starting fresh, in whole or in part{why}: {', '.join(fresh)}."
