"""The checkpointer: loads weights from anywhere into a model, and tells what does not fit."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm

from ..utils.errors import UserError
from ..utils.files import INCOMPLETE, write_whole
from ..utils.text import listed
from .compatibility import Fit, compare, misfit, misfit_for_training, summary
from .conversion import CLASS_NAMES, Pixels, Weights, check_finite, read_weights
from .fetching import find_file
from .reading import NotWeightsError, check_whole, reason
from .writing import why_not_written

__all__ = ["MaskScoringCheckpointer", "numbered_checkpoints"]

RGB_ADVICE = (
    " The images are RGB: set model.input_format and image_format of the mappers to RGB (yaml: "
    "INPUT.FORMAT). Such models mostly have strides in the 3x3 convolutions: set stride_in_1x1 to "
    "False (yaml: MODEL.RESNETS.STRIDE_IN_1X1)."
)
# A checkpoint by its iteration, and no other file that somebody keeps beside it
NUMBERED = re.compile(r"(?:^|/)model_(\d{7,})\.pth$")
MATCHING = re.compile(r"\?matching_heuristics=\w*$")


class MaskScoringCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that reads the weights of other frameworks, trusts no file, and
    does not go on with weights that do not fit.

    It recognises by the names of the parameters: checkpoints of this package, of Detectron2 and
    of its model zoo; Mask R-CNN and Mask Scoring R-CNN of MMDetection and of the paper's release;
    torchvision's Mask R-CNN; ImageNet weights of all of them.

    What it saves is what :class:`DetectionCheckpointer` saves; but a file appears under its name,
    and in "last_checkpoint", when it is complete and on the disk, and not before; and it has the
    names of classes, as "class_names".

    Attributes:
        class_names: in the order of the classes, what is saved with the weights; None for none.
        loaded_class_names: those in the file that was loaded last; None if it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        class_names: Sequence[str] | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.class_names = class_names
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
            path: a file; a URL with "https://" or "detectron2://"; the name of a config that
                weights were published for, of this package or of Detectron2. Empty to leave the
                model as it is.
            checkpointables: names of those to load besides the model, all by default.
            strict: whether the file has to provide all parameters, as an evaluation needs. If
                not, those that it does not provide start fresh, unless they are frozen.
            finite: whether NaN and infinity are refused.

        Returns:
            what the file has besides.

        Raises:
            UserError: the file cannot be had or read, or its parameters do not fit or are NaN or
                infinite; the model is as it was.
        """
        if not path:
            self.logger.info("No checkpoint is given: the model starts from random weights.")
            return {}
        matching = MATCHING.search(path)  # how configs of Detectron2 ask for it
        file = find_file(path[: matching.start()] if matching else path)
        weights = read_weights(file)
        if matching:
            weights.matched_by_suffix = True
        if finite:
            check_finite(weights.state_dict, file)
        self._load_weights(weights, file, strict)
        self.loaded_class_names = weights.class_names
        if strict and self.class_names is None:  # what is loaded as a whole is saved as a whole
            self.class_names = weights.class_names
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
        The checkpoint to go on from: the one that "last_checkpoint" names, or if that one is
        damaged the newest before it that is not. All processes get what the first one finds, and
        have to call this together.

        Returns:
            the path of a file whose checksums are right; None if there is no checkpoint.

        Raises:
            UserError: there are checkpoints, but all of them are damaged.
        """
        return _found_by_first_process(self._find_complete)

    def _find_complete(self) -> str | None:
        if _is_remote(self.save_dir):
            return self.get_checkpoint_file() if self.has_checkpoint() else None
        candidates = self._candidates()
        for path in candidates:
            try:
                check_whole(path)
            except NotWeightsError as error:
                self.logger.warning("'%s' %s: looking for the checkpoint before.", path, error.what)
            else:
                return path
        if candidates:
            raise UserError(
                f"No checkpoint in '{self.save_dir}' can be read, of {', '.join(candidates)}: "
                "choose another output folder, or train without --resume."
            )
        return None

    def _candidates(self) -> list[str]:
        """The file that "last_checkpoint" names, then those of earlier iterations."""
        numbered = numbered_checkpoints(self.save_dir)
        if not self.has_checkpoint():
            return [path for _, path in reversed(numbered)]
        tagged = self.get_checkpoint_file()
        number = NUMBERED.search(tagged)
        earlier = [path for k, path in numbered if not number or k < int(number[1])]
        return [tagged, *reversed(earlier)]

    def save(self, name: str, **kwargs: Any) -> None:
        """
        As in :class:`DetectionCheckpointer`.

        Raises:
            UserError: the disk is full, or refuses to write for another reason; older checkpoints
                are as they were.
        """
        if _is_remote(self.save_dir) or not (self.save_dir and self.save_to_disk):
            super().save(name, **self._names(), **kwargs)
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        states = {key: x.state_dict() for key, x in self.checkpointables.items()}
        contents = {"model": self.model.state_dict(), **states, **self._names(), **kwargs}
        try:
            with write_whole(path) as f:
                torch.save(contents, f)
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:  # the latter from PyTorch
            raise UserError(
                f"Cannot write checkpoint '{path}' ({why_not_written(error)}). Older checkpoints "
                "are as they were: make room, and go on with --resume."
            ) from error
        for left_behind in glob.glob(f"{glob.escape(self.save_dir)}/*.pth{INCOMPLETE}"):
            os.remove(left_behind)  # of a process that was killed

    def _names(self) -> dict[str, list[str]]:
        return {CLASS_NAMES: list(self.class_names)} if self.class_names is not None else {}

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if _is_remote(self.save_dir):
            super().tag_last_checkpoint(last_filename_basename)
            return
        with write_whole(os.path.join(self.save_dir, "last_checkpoint"), "w") as f:
            f.write(last_filename_basename)

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
            self.logger.warning("Not used, since the model has none: %s", listed(fit.unexpected))
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


def numbered_checkpoints(folder: str) -> list[tuple[int, str]]:
    """Iteration and path of the checkpoints that were saved in the course of a training, sorted."""
    paths = glob.glob(f"{glob.escape(folder)}/*.pth")
    numbers = ((NUMBERED.search(path), path) for path in paths)
    return sorted((int(number[1]), path) for number, path in numbers if number)


def _is_remote(path: str) -> bool:
    """Whether it is one of those that only a handler of iopath can open."""
    return "://" in path


def _found_by_first_process(find: Callable[[], str | None]) -> str | None:
    """What `find` returns, or raises, in the main process, in all processes."""
    found = message = None
    if comm.is_main_process():
        try:
            found = find()
        except UserError as error:
            message = str(error)
    found, message = comm.all_gather((found, message))[0]
    if message:
        raise UserError(message)
    return found


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


def _pixels(model: nn.Module) -> Pixels | None:
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
