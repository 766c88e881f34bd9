"""What one process of a job knows and all have to act on."""

import torch
import torch.distributed as dist

from detectron2.utils import comm

__all__ = ["any_process"]


def any_process(flag: bool) -> bool:
    """
    Whether `flag` is true in any process; all have to call it together. It is made for each step:
    a number is reduced on the CPU, where `comm.all_gather` pickles and waits twice.
    """
    if comm.get_world_size() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    return bool(flags)
