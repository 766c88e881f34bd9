"""How the parameters of a file and those of a model go together, and how to tell a person."""

import re
from dataclasses import dataclass

import torch
from torch import nn

from ..utils.text import listed, plural
from .conversion import CLASS_BIAS, COUNTER, SCORE_EXPONENT

__all__ = [
    "Fit",
    "compare",
    "frozen_class_scores",
    "misfit",
    "misfit_for_training",
    "summary",
]

BACKBONE = "backbone.bottom_up."
MASK_IOU_HEAD = "roi_heads.mask_iou_head."


@dataclass
class Fit:
    """
    How the parameters of a file and of a model go together; persistent buffers count as well.

    Attributes:
        total: number of the model's parameters.
        given: names of the model's that come from the file.
        missing: names of the model's that the file lacks.
        unexpected: names of the file's that the model lacks.
        shapes: {name: (shape in the file, shape in the model)} where they differ.
        types: {name: (type in the file, type in the model)} where one is of integers and the
            other of floating-point numbers: loading would convert them as if they meant the same.
        score_exponent: the file's, if it has one and the model takes it. It is a setting and not
            counted: a file may lack it.
    """

    total: int
    given: list[str]
    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple, tuple]]
    types: dict[str, tuple[torch.dtype, torch.dtype]]
    score_exponent: torch.Tensor | None

    @property
    def absent(self) -> list[str]:
        """Names of the model's parameters that do not come from the file."""
        return [*self.missing, *self.shapes]


def compare(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> Fit:
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith(COUNTER)}
    given = {k: v for k, v in state_dict.items() if not k.endswith(COUNTER)}
    takes_exponent = expected.pop(SCORE_EXPONENT, None) is not None
    score_exponent = given.pop(SCORE_EXPONENT, None) if takes_exponent else None
    return Fit(
        total=len(expected),
        given=[k for k, v in expected.items() if k in given and given[k].shape == v.shape],
        missing=[k for k in expected if k not in given],
        unexpected=[k for k in given if k not in expected],
        shapes={
            k: (tuple(given[k].shape), tuple(v.shape))
            for k, v in expected.items()
            if k in given and given[k].shape != v.shape
        },
        types={
            k: (given[k].dtype, v.dtype)
            for k, v in expected.items()
            if k in given and given[k].is_floating_point() != v.is_floating_point()
        },
        score_exponent=score_exponent,
    )


def misfit_for_training(fit: Fit, model: nn.Module) -> str:
    """Why training cannot start from a file, or ""."""
    if not fit.given:
        return _nothing_fits(fit)
    if fit.types:
        return _types_differ(fit)
    if _is_wrong_exponent(fit.score_exponent):
        return _exponent_is_wrong(fit)
    frozen = _frozen(model)
    if not frozen.intersection(fit.absent):
        return ""
    if frozen.intersection(fit.shapes):
        return _shapes_differ(fit)
    stay_random = [name for name in fit.missing if name in frozen]
    if _is_backbone(fit) and not stay_random[0].startswith(BACKBONE):
        return _only_backbone(fit)
    return (
        f"it does not provide {listed(stay_random)}, which training leaves as they are, so they "
        "would stay random. The config describes another model."
    )


def _frozen(model: nn.Module) -> set[str]:
    """Names of the parameters, and buffers such as those of a frozen batch norm, that stay."""
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
    return any(CLASS_BIAS.fullmatch(name) for name in _frozen(model))


def misfit(fit: Fit) -> str:
    """Why a model with these weights cannot be evaluated, or ""."""
    if not fit.given and not fit.shapes:
        return _nothing_fits(fit)
    if fit.types:
        return _types_differ(fit)
    if fit.shapes:
        return _shapes_differ(fit)
    if _is_wrong_exponent(fit.score_exponent):
        return _exponent_is_wrong(fit)
    if fit.missing and all(k.startswith(MASK_IOU_HEAD) for k in fit.missing):
        return (
            "it is a plain Mask R-CNN, so the mask IoU head has no weights "
            f"({listed(fit.missing)}). Train that head alone, which leaves boxes, classes and "
            "masks as they are: train_net.py --retrofit (see projects/retrofit). To evaluate the "
            "Mask R-CNN as it is, use its own config."
        )
    if fit.missing and _is_backbone(fit):
        return _only_backbone(fit)
    if fit.missing:
        return f"it does not provide {_by_module(fit)}. The config describes another model."
    # A retrofitted Mask R-CNN is still a Mask R-CNN
    unexpected = [k for k in fit.unexpected if not k.startswith(MASK_IOU_HEAD)]
    if unexpected:
        return f"the model has no {listed(unexpected)}. The config describes another model."
    return ""


def _nothing_fits(fit: Fit) -> str:
    if fit.shapes:
        return _shapes_differ(fit)
    missing = set(fit.missing)
    for name in fit.unexpected:
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in missing:
                return (
                    f"its names begin with '{name[: dot.end()]}', which is not known here. Save "
                    "the state_dict() of the model itself, without what is wrapped around it."
                )
    return (
        "it has none of the model's parameters. It belongs to another kind of model, or names its "
        "parameters in a way that is not known here."
    )


def _by_module(fit: Fit) -> str:
    """Parameters that the file lacks; if they are many, in which modules, and what it has there."""
    if len(fit.missing) <= 3:
        return listed(fit.missing)
    text = f"{listed(fit.missing)} (in {', '.join(_modules(fit.missing))})"
    unexpected = [k for k in fit.unexpected if not k.startswith(MASK_IOU_HEAD)]
    return f"{text}, but has {', '.join(_modules(unexpected))}" if unexpected else text


def _modules(names: list[str]) -> list[str]:
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _is_backbone(fit: Fit) -> bool:
    return all(name.startswith(BACKBONE) for name in fit.given)


def _only_backbone(fit: Fit) -> str:
    return (
        f"it has the weights of a backbone only, without {listed(fit.missing)}, as training starts "
        "from. Give the checkpoint of a whole model."
    )


def _types_differ(fit: Fit) -> str:
    name, (given, expected) = next(iter(fit.types.items()))
    return (
        f"'{name}' is of type {given} in the file and {expected} in the model, as in a quantised "
        "model. Give the weights as floating-point numbers."
    )


def _is_wrong_exponent(value: torch.Tensor | None) -> bool:
    return value is not None and not (value.ndim == 0 and value.isfinite() and value >= 0)


def _exponent_is_wrong(fit: Fit) -> str:
    assert fit.score_exponent is not None
    value, shape = fit.score_exponent, tuple(fit.score_exponent.shape)
    return (
        f"'{SCORE_EXPONENT}' is {f'of shape {shape}' if shape else f'{value.item():g}'}, not a "
        "finite number of at least 0. `python -m msrcnn_d2.fit_exponent --exponent 1` writes a "
        "copy with the paper's."
    )


def _shapes_differ(fit: Fit) -> str:
    classes = _classes(fit)
    if classes:
        return (
            f"it has {plural(classes[0], 'class', 'classes')}, the model {classes[1]}. Set "
            f"model.roi_heads.num_classes={classes[0]} (yaml: MODEL.ROI_HEADS.NUM_CLASSES "
            f"{classes[0]})."
        )
    name, (given, expected) = next(iter(fit.shapes.items()))
    more = len(fit.shapes) - 1
    return (
        f"'{name}' has shape {given} in the file and {expected} in the model"
        + (f", and {more} more differ" if more else "")
        + ". The config describes another model."
    )


def _classes(fit: Fit) -> tuple[int, int] | None:
    """The number of classes in the file and in the model, if they differ."""
    for name, (given, expected) in fit.shapes.items():
        if CLASS_BIAS.fullmatch(name):
            return given[0] - 1, expected[0] - 1  # one row is the background's
    return None


def summary(fit: Fit, file: str, source: str) -> str:
    text = f"{len(fit.given)} of {fit.total} parameters from '{file}' ({source})"
    if not fit.absent:
        return text + "."
    classes = _classes(fit)
    why = (
        f" (the file has {plural(classes[0], 'class', 'classes')}, the model {classes[1]})"
        if classes
        else ""
    )
    return f"{text}. Starting fresh, in whole or in part{why}: {', '.join(_modules(fit.absent))}."
