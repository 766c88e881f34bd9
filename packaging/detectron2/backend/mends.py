"""The changes that let Detectron2 0.6 work without compiled code and with current libraries."""

from pathlib import Path
from typing import NamedTuple

from .archive import BuildError

# Apache-2.0 asks that a modified file say so.
NOTICE = "# Modified: differs from Detectron2 0.6; this build's README says how.\n"


class Mend(NamedTuple):
    """Replace `old`, which occurs `times` times in `file`, by `new`."""

    file: str
    old: str
    new: str
    times: int = 1


MENDS = (
    # Pillow 10 removed this name for BILINEAR.
    Mend("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # NumPy 1.24 removed these names for Python's own types.
    Mend("detectron2/data/build.py", "dtype=np.int", "dtype=int", 2),
    Mend("detectron2/data/datasets/pascal_voc.py", "dtype=np.str", "dtype=str"),
    Mend("detectron2/evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", 2),
    Mend("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Mend("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.float", "dtype=float", 2),
    Mend("detectron2/evaluation/sem_seg_evaluation.py", "astype(np.float)", "astype(float)", 3),
    Mend("detectron2/structures/masks.py", "astype(np.bool)", "astype(bool)", 2),
    Mend("detectron2/structures/masks.py", "dtype=np.bool", "dtype=bool"),
    Mend("detectron2/utils/video_visualizer.py", "dtype=np.bool", "dtype=bool"),
    Mend("detectron2/utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3),
    # NumPy 2 raises an error where copy=False cannot be fulfilled.
    Mend("detectron2/layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)"),
    # Python 3.11 no longer draws samples from a set.
    Mend(
        "detectron2/data/common.py",
        "sample(self._fallback_candidates, ",
        "sample(list(self._fallback_candidates), ",
    ),
    # matplotlib rejects a colour that rounding takes just out of [0, 1].
    Mend(
        "detectron2/utils/visualizer.py",
        "        return modified_color\n",
        "        return tuple(np.clip(modified_color, 0.0, 1.0))\n",
    ),
    # PyTorch 2.0 renamed the base class of its schedulers; the hook that looks for the old name
    # leaves them out of checkpoints.
    Mend(
        "detectron2/engine/hooks.py",
        "torch.optim.lr_scheduler._LRScheduler",
        "torch.optim.lr_scheduler.LRScheduler",
        2,
    ),
    # PyTorch warns that meshgrid will require this argument, and that torch.cuda.amp has moved.
    Mend(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
    Mend(
        "detectron2/projects/panoptic_deeplab/post_processing.py",
        "        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n",
        "        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n"
        '        indexing="ij",\n',
    ),
    Mend(
        "detectron2/engine/train_loop.py", "from torch.cuda.amp import", "from torch.amp import", 2
    ),
    Mend("detectron2/engine/train_loop.py", "with autocast():", 'with autocast("cuda"):'),
    # setuptools 82 removed pkg_resources.
    Mend("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Mend(
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", ',
        "os.path.join(\n        os.path.dirname(__file__), ",
    ),
    # Without compiled code COCOEvaluator falls back to pycocotools, as in the main branch.
    Mend(
        "detectron2/evaluation/fast_eval_api.py",
        "from detectron2 import _C\n",
        "from detectron2 import _C\nfrom detectron2._C import COCOevalAccumulate  # noqa: F401\n",
    ),
    Mend(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n"
        "    COCOeval_opt = COCOeval\n",
    ),
    # torchvision has deformable convolution; Detectron2 needs its own, and on CPUs has no training.
    Mend(
        "detectron2/layers/deform_conv.py",
        "deform_conv = _DeformConv.apply\nmodulated_deform_conv = _ModulatedDeformConv.apply\n",
        "from .torchvision_deform_conv import deform_conv, modulated_deform_conv  # noqa: E402\n",
    ),
    # _C names the operator that is missing; torch.ops would only say that it has none.
    Mend(
        "detectron2/layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(",
        "    from detectron2 import _C\n\n    return _C.nms_rotated(",
    ),
    # PyTorch no longer has Caffe2; the rest of this package, TorchScript, does not need it.
    Mend(
        "detectron2/export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:\n    pass\n",
    ),
)


def apply_mends(mends: tuple[Mend, ...], directory: Path) -> None:
    """Change the files below `directory`; raise an error if one is not as expected."""
    for mend in mends:
        path = directory / mend.file
        text = path.read_bytes().decode("utf-8")
        found = text.count(mend.old)
        if found != mend.times:
            raise BuildError(
                f"{mend.file} holds {mend.old!r} {found} times where {mend.times} were expected, "
                "so the list of changes in backend/mends.py does not fit these sources."
            )
        text = text.replace(mend.old, mend.new)
        path.write_bytes((text if text.startswith(NOTICE) else NOTICE + text).encode("utf-8"))
