"""What one process of a job knows and all have to act on."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from detectron2.utils import comm

__all__ = ["StepAgreement"]


class StepAgreement:
    """
    Questions that any process may answer with yes, asked in each step of a training.

    The processes of a job reduce all answers at once, with numbers on the CPU: for each question
    `comm.all_gather` would pickle and wait twice.
    """

    def __init__(self):
        self._questions: list[Callable[[], bool]] = []
        self._answers: list[bool] = []

    def add(self, question: Callable[[], bool]) -> Callable[[], bool]:
        """
        Args:
            question: called in each process by :meth:`settle`.

        Returns:
            function that tells whether any process has answered with yes in this step. A single
            process is asked again, so that it need not wait for the next step.
        """
        index = len(self._questions)
        self._questions.append(question)

        def answer() -> bool:
            return question() if comm.get_world_size() == 1 else self._answers[index]

        return answer

    def settle(self) -> None:
        """Ask all questions; all processes have to call it together, once in each step."""
        if comm.get_world_size() == 1:
            return
        answers = torch.tensor([question() for question in self._questions], dtype=torch.int32)
        dist.all_reduce(answers, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        self._answers = [bool(x) for x in answers.tolist()]
