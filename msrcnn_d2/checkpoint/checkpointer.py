"""The checkpointer: loads weights from anywhere into a model, and says what does not fit."""

import glob
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm

from msrcnn_d2_runtime.files import INCOMPLETE, write_whole
from msrcnn_d2_runtime.text import listed

from ..utils.errors import UserError, agree_on_user_errors
from .compatibility import Fit, compare, frozen_parameters, misfit, summary
from .conversion import CLASS_NAMES, Weights, check_finite, read_weights
from .fetching import find_file
from .reading import NotWeightsError, check_whole, reason
from .writing import why_not_written

__all__ = ["BEST", "MaskScoringCheckpointer", "numbered_checkpoints"]

RGB_ADVICE = (
    " The images are RGB: set model.input_format and image_format of the mappers to RGB (yaml: "
    "INPUT.FORMAT). Such models mostly have strides in the 3x3 convolutions: set stride_in_1x1 to "
    "False (yaml: MODEL.RESNETS.STRIDE_IN_1X1)."
)
# A checkpoint that is named by its iteration, unlike other files that somebody keeps beside it
NUMBERED = re.compile(r"(?:^|/)model_(\d{7,})\.pth$")
MATCHING = re.compile(r"\?matching_heuristics=\w*$")
# What Detectron2's BestCheckpointer, and ours, calls the best checkpoint of a training
BEST = "model_best"


class MaskScoringCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that reads the weights of other frameworks, runs no code from
    files, and refuses weights that do not fit.

    It recognises whose weights a file has by the names of the parameters: this package's,
    Detectron2's and its model zoo's; Mask R-CNN and Mask Scoring R-CNN of MMDetection and of the
    paper's release; torchvision's Mask R-CNN; ImageNet weights of all of them.

    It saves what :class:`DetectionCheckpointer` saves, and the names of the classes as
    "class_names". A file gets its name, and is named by "last_checkpoint", only after it has been
    written completely. "model_best.pth" is never named by it, since a training continues from its
    last checkpoint and not from its best one.

    A file that has averages of the weights (EMA) as "ema_state" gives these to the model, and the
    weights under "model" only to a training that resumes.

    Attributes:
        class_names: saved with the weights, in the order of the classes; None to save none.
        takes_averages: False to take the weights under "model" in any case.
        loaded_class_names: those in the file that was loaded last; None if it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        class_names: Sequence[str] | None = None,
        takes_averages: bool = True,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.class_names = class_names
        self.takes_averages = takes_averages
        self.loaded_class_names: list[str] | None = None

    def load(
        self,
        path: str,
        checkpointables: list[str] | None = None,
        *,
        strict: bool = False,
        finite: bool = True,
    ) -> dict[str, Any]:
        """
        Args:
            path: a file; a URL with "https://" or "detectron2://"; or the name of a config of this
                package or of Detectron2, for the weights that were published for it. Empty to
                leave the model as it is.
            checkpointables: names of what to load in addition to the model; all by default.
            strict: whether the file has to provide all parameters, as an evaluation needs. If
                not, parameters that the file lacks start fresh, unless they are frozen.
            finite: whether NaN and infinity are refused.

        Returns:
            what else the file has.

        Raises:
            UserError: the file cannot be found, downloaded or read, its parameters do not fit, or
                they are NaN or infinite. The model is unchanged.
        """
        if not path:
            self.logger.info("No checkpoint is given: the model starts from random weights.")
            return {}
        matching = MATCHING.search(path)  # how configs of Detectron2 ask for it
        file = find_file(path[: matching.start()] if matching else path)
        if checkpointables is None:
            checkpointables = list(self.checkpointables)
        weights = read_weights(file, self.takes_averages and not checkpointables)
        if matching:
            weights.matched_by_suffix = True
        if finite:
            check_finite(weights.state_dict, file)
        self._load_weights(weights, file, strict)
        self.loaded_class_names = weights.class_names
        if strict and self.class_names is None:  # the whole model is loaded, and will be saved so
            self.class_names = weights.class_names
        extras = weights.extras
        for key in checkpointables:
            if key not in extras:
                continue
            self.logger.info("Loading %s from %s", key, file)
            try:
                self.checkpointables[key].load_state_dict(extras.pop(key))
            except (KeyError, ValueError) as error:
                raise UserError(
                    f"'{file}' is of another training: its {key} does not fit ({reason(error)}). "
                    "Choose another output folder, or do not resume."
                ) from error
        return extras

    def _load_weights(self, weights: Weights, file: str, strict: bool) -> None:
        state_dict = weights.state_dict
        of_caffe2 = weights.source == "Caffe2"
        if weights.matched_by_suffix:
            try:
                state_dict = align_and_update_state_dicts(
                    self.model.state_dict(), state_dict, c2_conversion=of_caffe2
                )
            except ValueError as error:
                raise UserError(
                    f"'{file}' ({weights.source}) does not fit the model: one of its names is the "
                    "end of several of the model's names. Give a file with the model's own names."
                ) from error
        fit = compare(self.model, state_dict)
        if of_caffe2:  # where batch norm is folded into a scale and a shift
            fit.missing = [k for k in fit.missing if not re.search(r"\.running_(mean|var)$", k)]
        why_not = misfit(fit, None if strict else frozen_parameters(self.model))
        if why_not:
            raise UserError(f"'{file}' ({weights.source}) does not fit the model: {why_not}")
        self._load_model({"model": state_dict})
        self.logger.info("Loaded %s", summary(fit, file, weights.origin))
        self._warn(fit, weights)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """The summary in the log says it in one line."""

    def _warn(self, fit: Fit, weights: Weights) -> None:
        if weights.note:
            self.logger.warning("Weights of %s: %s", weights.source, weights.note)
        if fit.unexpected:
            self.logger.warning("Not used, since the model has none: %s", listed(fit.unexpected))
        found = (getattr(self.model, name, None) for name in ("pixel_mean", "pixel_std"))
        tensors = [x for x in found if isinstance(x, torch.Tensor)]
        if weights.pixels is None or len(tensors) < 2:
            return
        model_pixels = [[round(v, 3) for v in x.flatten().tolist()] for x in tensors]
        if any(
            len(a) != len(b) or not np.allclose(a, b, rtol=0, atol=0.01)
            for a, b in zip(weights.pixels, model_pixels)
        ):
            mean, std = weights.pixels
            self.logger.warning(
                "Weights like these are trained on images normalised by mean %s and standard "
                "deviation %s; the model has %s and %s. Set model.pixel_mean and model.pixel_std "
                "(yaml: MODEL.PIXEL_MEAN, MODEL.PIXEL_STD).%s",
                *(mean, std, *model_pixels, RGB_ADVICE if mean[0] > mean[-1] else ""),
            )

    def resume_or_load(
        self, path: str, *, resume: bool = True, strict: bool = False
    ) -> dict[str, Any]:
        """
        With `resume`, load :meth:`last_complete_checkpoint` with all its checkpointables if there
        is one. Else load the model only; arguments as in :meth:`load`.
        """
        last = self.last_complete_checkpoint() if resume else None
        if last is None:
            return self.load(path, checkpointables=[], strict=strict)
        if not (os.path.isfile(last) or _is_remote(last)):
            raise UserError(
                f"Checkpoint '{last}' is on the first machine only: use an output folder that all "
                "machines share, or copy the checkpoint to each of them."
            )
        return self.load(last, strict=True)

    def last_complete_checkpoint(self) -> str | None:
        """
        Find the checkpoint that training can continue from: the one that "last_checkpoint" names
        or, if that is damaged, the newest undamaged one before it. The first process looks for it;
        all processes have to call this together.

        Returns:
            the path of a file whose checksums are right; None if there is no checkpoint.

        Raises:
            UserError: there are checkpoints, but all of them are damaged.
        """
        path = None
        with agree_on_user_errors():
            if comm.is_main_process():
                path = self._find_complete()
        return comm.all_gather(path)[0]

    def _find_complete(self) -> str | None:
        if _is_remote(self.save_dir):
            return self.get_checkpoint_file() if self.has_checkpoint() else None
        numbered = numbered_checkpoints(self.save_dir)
        candidates = [path for _, path in reversed(numbered)]
        if self.has_checkpoint():
            last = self.get_checkpoint_file()
            number = NUMBERED.search(last)
            earlier = [path for k, path in numbered if not number or k < int(number[1])]
            candidates = [last, *reversed(earlier)]
        for path in candidates:
            try:
                check_whole(path)
            except NotWeightsError as error:
                self.logger.warning("'%s' %s: trying the checkpoint before it.", path, error.what)
            else:
                return path
        if candidates:
            raise UserError(
                f"No checkpoint in '{self.save_dir}' can be read, of {', '.join(candidates)}: "
                "choose another output folder, or train without --resume."
            )
        return None

    def save(self, name: str, **kwargs: Any) -> None:
        """
        As in :class:`DetectionCheckpointer`.

        Raises:
            UserError: the checkpoint cannot be written, for example because the disk is full;
                older checkpoints are unchanged.
        """
        if self.class_names is not None:
            kwargs[CLASS_NAMES] = list(self.class_names)
        if _is_remote(self.save_dir) or not (self.save_dir and self.save_to_disk):
            super().save(name, **kwargs)
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        states = {key: x.state_dict() for key, x in self.checkpointables.items()}
        contents = {"model": self.model.state_dict(), **states, **kwargs}
        try:
            with write_whole(path) as f:
                torch.save(contents, f)
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:  # the latter from PyTorch
            raise UserError(
                f"Cannot write checkpoint '{path}' ({why_not_written(error)}). Older checkpoints "
                "are unchanged: make room, and continue with --resume."
            ) from error
        for left_behind in glob.glob(f"{glob.escape(self.save_dir)}/*.pth{INCOMPLETE}"):
            os.remove(left_behind)  # of a process that was killed

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if last_filename_basename == f"{BEST}.pth":
            return
        if _is_remote(self.save_dir):
            super().tag_last_checkpoint(last_filename_basename)
            return
        with write_whole(os.path.join(self.save_dir, "last_checkpoint"), "w") as f:
            f.write(last_filename_basename)


def numbered_checkpoints(folder: str) -> list[tuple[int, str]]:
    """Iteration and path of each checkpoint that training saved on its way, in this order."""
    paths = glob.glob(f"{glob.escape(folder)}/*.pth")
    numbers = ((NUMBERED.search(path), path) for path in paths)
    return sorted((int(number[1]), path) for number, path in numbers if number)


def _is_remote(path: str) -> bool:
    """Whether only a handler of iopath can open the path."""
    return "://" in path
