"""What a process does in the tests of several."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import create_ddp_model, default_setup
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

from msrcnn_d2.engine import build_recipe, train
from msrcnn_d2.engine.launch import launch_processes
from msrcnn_d2.engine.loaders import build_resumable_loader
from msrcnn_d2.engine.trainer import FiniteTrainer
from msrcnn_d2.utils import distributed
from msrcnn_d2.utils.distributed import StepAgreement
from msrcnn_d2.utils.errors import UserError, agree_on_user_errors, exit_on_user_error
from msrcnn_d2_cli import build_parser
from msrcnn_d2_cli.train import read_config
from tests.helpers.toy import IMAGE_SIZE, tiny_mask_scoring_rcnn, toy_inputs, without_objects
from tests.helpers.toy_training import lazy_config, write_dataset

DATASET = "toy_of_many"
MAX_ITER = 4
CHECKPOINT_PERIOD = 2

# What the second image has, beside the first one with its two objects
CASES = ("objects", "all samples", "no objects", "no matches", "neither has objects")


def tiny_model_config():
    """The batch norm is frozen, as in the recipes: else a loss depends on all images of a batch."""
    cfg = tiny_mask_scoring_rcnn().model
    for part in (cfg.backbone.bottom_up.stem, *cfg.backbone.bottom_up.stages):
        part.norm = "FrozenBN"
    return cfg


def write_dataset_and_config(folder: Path) -> list[str]:
    """
    Images and a LazyConfig that trains the tiny model on them, for a few iterations.

    Returns:
        the options that name them.
    """
    cfg = lazy_config(DATASET)
    cfg.train.max_iter = MAX_ITER
    cfg.train.checkpointer.period = CHECKPOINT_PERIOD
    path = str(folder / "config.yaml")
    LazyConfig.save(cfg, path)
    return ["--config-file", path, *write_dataset(folder, DATASET)]


class FailingRCNN(GeneralizedRCNN):
    """Raises in the second process, in the last iteration."""

    def forward(self, images):
        if self.training and comm.get_rank() == 1 and get_event_storage().iter == MAX_ITER - 1:
            raise ValueError("the second process has failed")
        return super().forward(images)


class WaitingRCNN(GeneralizedRCNN):
    """
    Waits for the other process in each forward pass, as a synchronised batch norm does; in the
    second one it fails in one of them before that.
    """

    def forward(self, images):
        distributed.PATIENCE_SECONDS = 2.0
        if self.training and comm.get_rank() == 1 and get_event_storage().iter == 1:
            raise FloatingPointError("The predictions are\nnot finite.")
        dist.all_reduce(torch.ones(3))
        return super().forward(images)


# ---- steps of one model


def build_model(case: str) -> torch.nn.Module:
    cfg = tiny_model_config()
    if case == "all samples":
        # No proposal is left out at random, and only the two objects themselves are foreground:
        # each image has as many samples of each kind
        cfg.proposal_generator.batch_size_per_image = 4096
        cfg.roi_heads.batch_size_per_image = 128
        cfg.roi_heads.proposal_matcher.thresholds = [0.99]
    if case == "no matches":
        cfg.roi_heads.proposal_append_gt = False
        cfg.roi_heads.proposal_matcher.thresholds = [0.3]
        cfg.proposal_generator.post_nms_topk = (200, 20)
    torch.manual_seed(0)
    return instantiate(cfg).train()


def images_of(case: str) -> list[dict]:
    """Two images, one for each process; the same ones in each step."""
    torch.manual_seed(1)
    first, second = toy_inputs()
    if case in ("no objects", "neither has objects"):
        second["instances"] = without_objects()
    if case == "neither has objects":
        first["instances"] = without_objects()
    if case == "no matches":
        second["instances"] = _specks()
    return [first, second]


def _specks() -> Instances:
    """Objects of 3 x 3 pixels: an anchor of 8 x 8 that contains one has an IoU of 0.14 with it."""
    polygons = [[[x, 20.0, x + 3, 20, x + 3, 23, x, 23]] for x in (20.0, 60.0)]
    return Instances(
        IMAGE_SIZE,
        gt_boxes=Boxes(torch.tensor([[20.0, 20, 23, 23], [60, 20, 63, 23]])),
        gt_classes=torch.tensor([0, 1]),
        gt_masks=PolygonMasks(polygons),
    )


def step(model, images: list[dict], seed: int) -> dict:
    """Losses and gradients; `seed` decides which anchors and proposals are sampled."""
    torch.manual_seed(seed)
    model.zero_grad()
    with EventStorage() as storage:
        losses = model(images)
        sum(losses.values()).backward()
        counted = {k: v for k, (v, _) in storage.latest().items() if "num_fg" in k}
    parameters = getattr(model, "module", model).named_parameters()
    return {
        "losses": {k: v.item() for k, v in losses.items()},
        "gradients": {n: p.grad.clone() for n, p in parameters if p.requires_grad},
        "foreground": counted["roi_head/num_fg_samples"],
    }


def two_steps(case: str) -> list[dict]:
    """Of this process, with its image, in a job of two."""
    rank = comm.get_rank()
    model = create_ddp_model(build_model(case), broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = []
    for _ in range(2):
        steps.append(step(model, [images_of(case)[rank]], seed=rank))
        optimizer.step()
    return steps


def step_in_parts() -> dict:
    """
    Gradients of a step of our trainer in a job of two, each with two images in two parts, and how
    often the processes have exchanged them.
    """
    first, second = images_of("all samples")
    images = [[first, second], [second, second]][comm.get_rank()]
    model = create_ddp_model(build_model("all samples"), broadcast_buffers=False, device_ids=None)
    exchanges: list[int] = []

    def exchange(state, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, exchange)
    trainer = FiniteTrainer(
        *(model, [images], torch.optim.SGD(model.parameters(), lr=0.01)),
        max_nonfinite_steps=0,
        agreement=StepAgreement(),
        image_ids=lambda: [],
        accumulation_steps=2,
    )
    with EventStorage():
        trainer.run_step()
    parameters = model.module.named_parameters()
    gradients = {n: p.grad.clone() for n, p in parameters if p.requires_grad}
    return {"gradients": gradients, "exchanges": exchanges}


# ---- whole runs


def order_of_images(upright: bool) -> list[list[int]]:
    """The images of each of this process's batches; `upright` says whether some of them are."""
    widths = [50 if upright and k % 3 == 0 else 200 for k in range(11)]
    dataset = [{"id": k, "width": w, "height": 100} for k, w in enumerate(widths)]
    loader = build_resumable_loader(
        dataset, mapper=lambda x: x["id"], seed=5, first_iter=0, total_batch_size=4
    )
    return [batch for batch, _ in zip(loader, range(11))]


def train_and_keep(options: list[str], output_dir: Path) -> dict:
    """What a run returns, and the weights that this process has before and after it."""
    args = build_parser("train").parse([*options, f"train.output_dir={output_dir}"])
    cfg = read_config(args)
    default_setup(cfg, args)
    recipe = build_recipe(cfg)
    torch.manual_seed(comm.get_rank())  # processes start from other weights
    model = recipe.build_model()
    recipe.build_model = lambda: model
    first = {k: v.clone() for k, v in model.state_dict().items()}
    return {"first": first, "results": train(recipe), "last": model.state_dict()}


def run_both(folder: Path, options: list[str]) -> None:
    """Two processes, which keep what they have computed in `folder`."""
    launch_processes(_keep, 2, device="cpu", args=(folder, options))


def _keep(folder, options):
    kept = {
        "steps": {case: two_steps(case) for case in CASES},
        "parts": step_in_parts(),
        "orders": {upright: order_of_images(upright) for upright in (False, True)},
        "run": train_and_keep(options, folder),
    }
    torch.save(kept, folder / f"rank_{comm.get_rank()}.pth")


def fail(failing: list[int]) -> None:
    """Two processes, of which some fail with a mistake of the user."""
    with exit_on_user_error():
        launch_processes(_fail, 2, device="cpu", args=(failing,))


def _fail(failing):
    with exit_on_user_error(), agree_on_user_errors():
        if dist.get_rank() == 0:
            time.sleep(1)  # the others must not leave before
        if dist.get_rank() in failing:
            raise UserError(f"the disk of {dist.get_rank()} is gone")
