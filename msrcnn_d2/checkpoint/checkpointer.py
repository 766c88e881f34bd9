"""The checkpointer: loads weights from anywhere into a model, and tells what does not fit."""

import re
from typing import Any, Optional

import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts

from ..errors import UserError
from .conversion import Pixels, Weights, read_weights
from .fetching import find_file
from .fitting import Fit, compare, misfit, misfit_for_training, shown, summary
from .reading import reason

__all__ = ["MaskScoringCheckpointer"]

RGB_ADVICE = (
    " The images are RGB: set model.input_format and image_format of the mappers to RGB (yaml: "
    "INPUT.FORMAT). Such models mostly have strides in the 3x3 convolutions: set stride_in_1x1 to "
    "False (yaml: MODEL.RESNETS.STRIDE_IN_1X1)."
)
MATCHING = re.compile(r"\?matching_heuristics=\w*$")


class MaskScoringCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that reads the weights of other frameworks, trusts no file, and
    does not go on with weights that do not fit.

    It recognises by the names of the parameters: checkpoints of this package, of Detectron2 and
    of its model zoo; Mask R-CNN and Mask Scoring R-CNN of MMDetection and of the paper's release;
    torchvision's Mask R-CNN; ImageNet weights of all of them. What it saves is what
    :class:`DetectionCheckpointer` saves.
    """

    def load(
        self, path: str, checkpointables: Optional[list[str]] = None, *, strict: bool = False
    ) -> dict[str, Any]:
        """
        Args:
            path: a file; a URL with "https://" or "detectron2://"; the name of a config that
                weights were published for, of this package or of Detectron2. Empty to leave the
                model as it is.
            checkpointables: names of those to load besides the model, all by default.
            strict: whether the file has to provide all parameters, as an evaluation needs. If
                not, those that it does not provide start fresh, unless they are frozen.

        Returns:
            what the file has besides.

        Raises:
            UserError: the file cannot be had or read, or its parameters do not fit; the model is
                as it was.
        """
        if not path:
            self.logger.info("No checkpoint is given: the model starts from random weights.")
            return {}
        matching = MATCHING.search(path)  # how configs of Detectron2 ask for it
        file = find_file(path[: matching.start()] if matching else path)
        weights = read_weights(file)
        if matching:
            weights.matched_by_suffix = True
        self._load_weights(weights, file, strict)
        extras = weights.extras
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in extras:
                self.logger.info("Loading %s from %s", key, file)
                self._load_checkpointable(key, extras.pop(key), file)
        return extras

    def _load_checkpointable(self, key: str, state: Any, file: str) -> None:
        try:
            self.checkpointables[key].load_state_dict(state)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"'{file}' is of another training: its {key} does not fit ({reason(error)}). "
                "Choose another output folder, or do not resume."
            ) from error

    def resume_or_load(
        self, path: str, *, resume: bool = True, strict: bool = False
    ) -> dict[str, Any]:
        """
        With `resume`, load the last checkpoint in `save_dir` with all its checkpointables if there
        is one; it has to be complete. Else load the model only; arguments as in :meth:`load`.
        """
        if resume and self.has_checkpoint():
            return self.load(self.get_checkpoint_file(), strict=True)
        return self.load(path, checkpointables=[], strict=strict)

    def _load_weights(self, weights: Weights, file: str, strict: bool) -> None:
        state_dict = weights.state_dict
        if weights.matched_by_suffix:
            state_dict = _matched(self.model, weights, file)
        fit = compare(self.model, state_dict)
        if weights.source == "Caffe2":  # where batch norm is folded into a scale and a shift
            fit.missing = [k for k in fit.missing if not re.search(r"\.running_(mean|var)$", k)]
        why_not = misfit(fit) if strict else misfit_for_training(fit, self.model)
        if why_not:
            raise UserError(f"'{file}' ({weights.source}) does not fit the model: {why_not}")
        self._load_model({"model": state_dict})
        self.logger.info("Loaded %s", summary(fit, file, weights.source))
        self._warn(fit, weights)

    def _warn(self, fit: Fit, weights: Weights) -> None:
        if weights.note:
            self.logger.warning("Weights of %s: %s", weights.source, weights.note)
        if fit.unexpected:
            self.logger.warning("Not used, since the model has none: %s", shown(fit.unexpected))
        pixels = _pixels(self.model)
        if weights.pixels and pixels and not _close(weights.pixels, pixels):
            mean, std = weights.pixels
            self.logger.warning(
                "Weights like these are trained on images normalised by mean %s and standard "
                "deviation %s; the model has %s and %s. Set model.pixel_mean and model.pixel_std "
                "(yaml: MODEL.PIXEL_MEAN, MODEL.PIXEL_STD).%s",
                *(mean, std, *pixels, RGB_ADVICE if mean[0] > mean[-1] else ""),
            )

    def _log_incompatible_keys(self, incompatible) -> None:
        """Said already, in one line."""


def _matched(model: nn.Module, weights: Weights, file: str) -> dict[str, torch.Tensor]:
    try:
        return align_and_update_state_dicts(
            model.state_dict(), weights.state_dict, c2_conversion=weights.source == "Caffe2"
        )
    except ValueError as error:
        raise UserError(
            f"'{file}' ({weights.source}) does not fit the model: one of its names is the end of "
            "several of the model's. Give a file with the model's own names."
        ) from error


def _pixels(model: nn.Module) -> Optional[Pixels]:
    mean, std = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    if not (isinstance(mean, torch.Tensor) and isinstance(std, torch.Tensor)):
        return None
    return _rounded(mean), _rounded(std)


def _rounded(tensor: torch.Tensor) -> list[float]:
    return [round(x, 3) for x in tensor.flatten().tolist()]


def _close(first, second) -> bool:
    return all(
        len(a) == len(b) and all(abs(x - y) < 0.01 for x, y in zip(a, b))
        for a, b in zip(first, second)
    )
