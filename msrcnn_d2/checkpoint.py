"""Checkpoints: read them, or say in one sentence why not."""

import os

from detectron2.checkpoint import DetectionCheckpointer

from .errors import UserError

__all__ = ["MaskScoringCheckpointer"]


class MaskScoringCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that never goes on with a file it could not use.

    A file that cannot be had or read, and one that holds none of the model's parameters, is a
    :class:`UserError`; Detectron2 starts from random weights after a warning in the last case.
    """

    def load(self, path, *args, **kwargs):
        if path and not os.path.isfile(path):
            path = self._local_path(path)
        return super().load(path, *args, **kwargs)

    def _local_path(self, path):
        try:
            local_path = self.path_manager.get_local_path(path)
        except Exception as error:  # of any of the libraries that fetch files
            raise UserError(
                f"Checkpoint '{path}' cannot be fetched ({_reason(error)}); download it by hand "
                "and give the path of the file."
            ) from error
        if not os.path.isfile(local_path):
            raise UserError(f"Checkpoint '{path}' does not exist.")
        return local_path

    def _load_file(self, filename):
        try:
            return super()._load_file(filename)
        except Exception as error:  # unpickling bytes that are no checkpoint raises anything
            raise UserError(
                f"Checkpoint '{filename}' cannot be read ({_reason(error)}); it is damaged or not "
                "a checkpoint."
            ) from error

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        parameters = {name for name, _ in self.model.named_parameters()}
        absent = set(incompatible.missing_keys) | {k for k, *_ in incompatible.incorrect_shapes}
        if parameters and parameters <= absent:
            raise UserError(
                "The checkpoint has none of the model's parameters: it belongs to another kind of "
                "model or names its parameters in another way. Give a Detectron2 checkpoint, or "
                "none to start from random weights."
            )
        return incompatible


def _reason(error: Exception) -> str:
    """First sentence of an error's message; some go on for a page, and advise to run any code."""
    message = str(error).strip().splitlines() or [type(error).__name__]
    return message[0].split(". ")[0].rstrip(".")
