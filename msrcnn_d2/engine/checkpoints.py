"""When checkpoints are saved in a training, and which of them are kept."""

from detectron2.engine import hooks
from detectron2.utils import comm

from ..checkpoint import MaskScoringCheckpointer
from ..checkpoint.checkpointer import numbered_checkpoints
from ..utils.errors import agree_on_user_errors

__all__ = ["PeriodicCheckpoints"]


class PeriodicCheckpoints(hooks.PeriodicCheckpointer):
    """
    `PeriodicCheckpointer` for all processes: the main process writes, and a disk that is full ends
    all of them. After a resumption `max_to_keep` counts the checkpoints of before, too.
    """

    def __init__(
        self, checkpointer: MaskScoringCheckpointer, period: int, max_to_keep: int | None = None
    ):
        super().__init__(checkpointer, period, max_to_keep=max_to_keep)
        self._saved_iter = -1

    def before_train(self):
        super().before_train()
        self._saved_iter = self.trainer.start_iter - 1  # the one it goes on from, if any
        earlier = numbered_checkpoints(self.checkpointer.save_dir)
        self.recent_checkpoints = [path for k, path in earlier if k < self.trainer.iter]

    def after_step(self):
        iteration = self.trainer.iter
        if (iteration + 1) % self.period and iteration < self.max_iter - 1:
            return
        with agree_on_user_errors():
            if comm.is_main_process():
                self.step(iteration)
                self._prune()
        self._saved_iter = iteration

    def _prune(self) -> None:
        """After a resumption there may be more to delete than the one for which one came."""
        while self.max_to_keep is not None and len(self.recent_checkpoints) > self.max_to_keep:
            self.path_manager.rm(self.recent_checkpoints.pop(0))

    def save_now(self) -> int:
        """
        Save the iteration that was done last, unless it has been saved; on the main process.

        Returns:
            its number.
        """
        iteration = min(self.trainer.iter, self.max_iter - 1)  # the first is more at the end
        if self._saved_iter != iteration:
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
            self._saved_iter = iteration
        return iteration
