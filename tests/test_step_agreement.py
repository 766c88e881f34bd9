"""What processes agree on in each step, with a stand-in for the other process."""

import pytest
import torch

from msrcnn_d2.utils import distributed as agreement_module
from msrcnn_d2.utils.distributed import StepAgreement


@pytest.fixture
def other_process(monkeypatch):
    """Its answers, which a test sets, and how often it was asked."""

    class Other:
        answers: list = []
        num_reductions = 0

        def all_reduce(self, tensor, operation, group):
            assert operation == torch.distributed.ReduceOp.MAX
            self.num_reductions += 1
            tensor.copy_(torch.maximum(tensor, torch.tensor(self.answers, dtype=tensor.dtype)))

    other = Other()
    monkeypatch.setattr(agreement_module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(agreement_module.comm, "_get_global_gloo_group", lambda: None)
    monkeypatch.setattr(agreement_module.dist, "all_reduce", other.all_reduce)
    return other


def test_all_questions_of_a_step_are_one_reduction(other_process):
    mine = [True, False, False]
    agreement = StepAgreement()
    answers = [agreement.add(lambda k=k: mine[k]) for k in range(3)]
    other_process.answers = [False, True, False]
    agreement.settle()
    assert [answer() for answer in answers] == [True, True, False]
    # What comes after it belongs to the next step, in all processes
    mine[2] = True
    assert answers[2]() is False
    agreement.settle()
    assert answers[2]() is True
    assert other_process.num_reductions == 2


def test_a_single_process_is_asked_when_the_answer_is_needed():
    flag = [False]
    answer = StepAgreement().add(lambda: flag[0])
    assert answer() is False
    flag[0] = True
    assert answer() is True
