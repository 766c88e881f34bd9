"""One description of a run for both kinds of config, so that there is one training loop."""

import copy
import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.utils.data import IterableDataset

from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    MapDataset,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, verify_results
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm

from ..config import target_of
from ..errors import UserError
from ..evaluation import MaskScoringCOCOEvaluator
from ..evaluation.coco_engine import choose_engine
from ..image_reading import ImageSettings, image_settings, read_with
from ..modeling import MaskScoringRCNNWithTTA
from .data_order import LOADER_OPTIONS, build_resumable_loader, outlines
from .inference_loader import build_test_loader
from .mask_format import fit_mask_format

__all__ = ["Recipe", "TestSet", "build_recipe"]

logger = logging.getLogger(__name__)


@dataclass
class TestSet:
    """
    Attributes:
        names: of the datasets, none if the config does not say.
        build_loader, build_evaluator: called anew for each evaluation.
        batch_size: images per batch and process; None if the config does not say. For checks only.
    """

    names: tuple[str, ...]
    build_loader: Callable[[], Any]
    build_evaluator: Callable[[], Any]
    batch_size: Optional[int] = None

    def __str__(self) -> str:
        return ", ".join(self.names) or "the test set"


@dataclass
class Recipe:
    """
    What to train and how; the parts are built when they are needed.

    Attributes:
        build_optimizer: called with the model.
        build_lr_scheduler: called with the optimizer; returns what `hooks.LRScheduler` takes.
        build_train_loader: called with (seed, first iteration, on_bad_images); see
            :class:`ResumableBatches`.
        wrap_for_test: called with the model; returns what is evaluated.
        train_names, num_classes: names of the training datasets, number of foreground classes;
            empty and None where the config does not say. For checks only.
        total_batch_size: images per iteration of all processes; None if the config does not say.
        seed: negative for a random one.
        eval_period, checkpoint_period, log_period, max_iter: in iterations.
        amp, test_amp: whether training and evaluation are in mixed precision.
        max_skipped_steps: in a row, by the gradient scaler of mixed precision.
        compile: whether `torch.compile` compiles what consists of layers only.
        max_bad_images: images that may be left out in training since they cannot be used.
        max_nonfinite_steps: steps that may be left out since their loss is not finite.
        check_images: whether to look at all images before training.
        images: how they are read.
        precise_bn_iters: iterations of precise batch norm before each evaluation, 0 for none.
        ddp: arguments of `create_ddp_model`.
        verify_results: called with the results at the end of a run.
    """

    build_model: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], Any]
    build_lr_scheduler: Callable[[Any], Any]
    build_train_loader: Callable[[int, int, Callable], Any]
    test_sets: list[TestSet]
    train_names: tuple[str, ...]
    num_classes: Optional[int]
    total_batch_size: Optional[int]
    device: str
    seed: int
    output_dir: str
    init_checkpoint: str
    max_iter: int
    eval_period: int
    log_period: int
    checkpointer: dict
    amp: bool
    test_amp: bool = False
    max_skipped_steps: int = 50
    compile: bool = False
    ddp: dict = field(default_factory=dict)
    max_bad_images: int = 10
    max_nonfinite_steps: int = 0
    check_images: bool = True
    images: ImageSettings = field(default_factory=ImageSettings)
    precise_bn_iters: int = 0
    wrap_for_test: Callable[[nn.Module], nn.Module] = lambda model: model
    verify_results: Callable[[dict], Any] = lambda results: None


def build_recipe(cfg: "DictConfig | CfgNode") -> Recipe:
    """
    Args:
        cfg: a training config of either kind. A LazyConfig has what Detectron2's
            `tools/lazyconfig_train_net.py` expects.
    """
    return _from_yacs(cfg) if isinstance(cfg, CfgNode) else _from_lazy(cfg)


def _from_lazy(cfg: DictConfig) -> Recipe:
    train = cfg.train
    if OmegaConf.select(cfg, "train.model_ema.enabled"):
        raise UserError("train.model_ema is not supported: set train.model_ema.enabled=False.")

    images = image_settings(cfg)

    def build_lazy_optimizer(model):
        cfg.optimizer.params.model = model
        return instantiate(cfg.optimizer)

    return Recipe(
        build_model=lambda: instantiate(cfg.model),
        build_optimizer=build_lazy_optimizer,
        build_lr_scheduler=lambda optimizer: instantiate(cfg.lr_multiplier),
        build_train_loader=functools.partial(_lazy_train_loader, cfg.dataloader.train, images),
        test_sets=_lazy_test_sets(cfg, images),
        train_names=_names(OmegaConf.select(cfg, "dataloader.train.dataset.names")),
        num_classes=OmegaConf.select(cfg, "model.roi_heads.num_classes"),
        total_batch_size=OmegaConf.select(cfg, "dataloader.train.total_batch_size"),
        device=train.device,
        seed=train.get("seed", -1),
        output_dir=train.output_dir,
        init_checkpoint=train.init_checkpoint,
        max_iter=train.max_iter,
        eval_period=train.eval_period,
        log_period=train.log_period,
        checkpointer=dict(train.checkpointer),
        amp=train.amp.enabled,
        test_amp=train.amp.get("test", False),
        max_skipped_steps=train.amp.get("max_skipped_steps", 50),
        compile=train.get("compile", False),
        ddp=dict(train.ddp),
        max_bad_images=train.get("max_bad_images", 10),
        max_nonfinite_steps=train.get("max_nonfinite_steps", 0),
        check_images=train.get("check_images", True),
        images=images,
    )


def _lazy_train_loader(
    loader: DictConfig, images: ImageSettings, seed: int, first_iter: int, on_bad_images: Callable
):
    if target_of(loader) is not build_detection_train_loader:
        _warn_of_foreign_loader("dataloader.train is a loader of your own")
        return target_of(loader)(**_reading(_arguments_of(loader), images))
    return _train_loader(_arguments_of(loader), images, seed, first_iter, on_bad_images)


def _arguments_of(loader: DictConfig) -> dict[str, Any]:
    return {str(k): instantiate(v) for k, v in loader.items() if k != "_target_"}


def _reading(arguments: dict[str, Any], images: ImageSettings) -> dict[str, Any]:
    """Arguments of a loader whose mapper, if there is one, reads images by the settings."""
    if arguments.get("mapper") is None:
        return arguments
    return {**arguments, "mapper": read_with(images, arguments["mapper"])}


def _train_loader(
    arguments: dict[str, Any],
    images: ImageSettings,
    seed: int,
    first_iter: int,
    on_bad_images: Callable,
):
    """Our loader for the arguments of Detectron2's; that one where ours cannot replace it."""
    dataset = arguments["dataset"]
    own_seed = arguments.pop("seed", None)
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset):
        _warn_of_foreign_loader("The training set is a stream, without an element for each index")
        return build_detection_train_loader(**_accepted_by_detectron2(_reading(arguments, images)))
    if isinstance(dataset, MapDataset) and arguments["mapper"] is None:
        dataset, arguments["mapper"] = dataset.__getnewargs__()  # what it was made of
        arguments["dataset"] = dataset
    known = set(inspect.signature(build_resumable_loader).parameters) | set(LOADER_OPTIONS)
    known -= {"seed", "first_iter", "on_bad_images", "options"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise UserError(
            f"dataloader.train has an argument '{unknown[0]}' that is not known; those known are "
            f"{', '.join(sorted(known | {'seed'}))}."
        )
    fit_mask_format(arguments["mapper"], outlines(dataset))
    return build_resumable_loader(
        seed=seed if own_seed is None else own_seed,
        first_iter=first_iter,
        on_bad_images=on_bad_images,
        **_reading(arguments, images),
    )


def _accepted_by_detectron2(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without those that version 0.6 does not have."""
    parameters = inspect.signature(build_detection_train_loader).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    left_out = sorted(set(arguments) - set(parameters))
    if left_out:
        logger.warning("This Detectron2 leaves out dataloader.train.%s.", ", ".join(left_out))
    return {k: v for k, v in arguments.items() if k in parameters}


def _warn_of_foreign_loader(reason: str) -> None:
    logger.warning(
        "%s: a run that is resumed gets other images than one that was not interrupted, an image "
        "that cannot be read ends the training, and masks in run-length encoding need "
        "instance_mask_format='bitmask' in the mapper.",
        reason,
    )


def _lazy_test_sets(cfg: DictConfig, images: ImageSettings) -> list[TestSet]:
    if "test" not in cfg.dataloader or "evaluator" not in cfg.dataloader:
        return []
    tests, evaluators = _as_list(cfg.dataloader.test), _as_list(cfg.dataloader.evaluator)
    for evaluator in evaluators:
        _check_engine(evaluator.get("engine"))
    # One loader may have several evaluators; several loaders have one each
    shares = [range(len(evaluators))] if len(tests) == 1 else [[k] for k in range(len(tests))]
    if len(tests) > 1 and len(tests) != len(evaluators):
        raise UserError(
            f"dataloader.test has {len(tests)} loaders and dataloader.evaluator "
            f"{len(evaluators)}: give each loader its evaluator."
        )
    return [
        TestSet(
            names=_names(OmegaConf.select(test, "dataset.names")),
            build_loader=functools.partial(_lazy_test_loader, test, images),
            build_evaluator=functools.partial(_lazy_evaluators, cfg, share, len(tests) > 1),
            batch_size=test.get("batch_size"),
        )
        for test, share in zip(tests, shares)
    ]


def _as_list(node) -> list:
    return list(node) if isinstance(node, ListConfig) else [node]


def _lazy_evaluators(cfg: DictConfig, share, in_own_folder: bool):
    """The evaluator of a loader; several are one of Detectron2's `DatasetEvaluators`."""
    built = [_lazy_evaluator(cfg, k, in_own_folder) for k in share]
    return built[0] if len(built) == 1 else DatasetEvaluators(built)


def _lazy_test_loader(loader: DictConfig, images: ImageSettings):
    build = target_of(loader)
    arguments = _reading(_arguments_of(loader), images)
    return (build_test_loader if build is build_detection_test_loader else build)(**arguments)


def _lazy_evaluator(cfg: DictConfig, index: int, in_own_folder: bool):
    """The evaluator; one of COCO writes its files into the output folder if not told otherwise."""
    # A copy: the config is what the user gave
    evaluator = _as_list(copy.deepcopy(cfg.dataloader).evaluator)[index]
    target = target_of(evaluator) if "_target_" in evaluator else None
    if isinstance(target, type) and issubclass(target, COCOEvaluator):
        folder = os.path.join(cfg.train.output_dir, "inference")
        if in_own_folder:
            folder = os.path.join(folder, ", ".join(_names(evaluator.get("dataset_name"))))
        evaluator.setdefault("output_dir", folder)
        limit = _detections_per_image(cfg)
        if limit is not None and limit > 100 and evaluator.get("max_dets_per_image") is None:
            evaluator.max_dets_per_image = limit
    return instantiate(evaluator)


def _detections_per_image(cfg: DictConfig) -> Optional[int]:
    """Of the model; None if the config does not say."""
    predictor = OmegaConf.select(cfg, "model.roi_heads.box_predictor")
    if isinstance(predictor, ListConfig):  # Cascade: the last stage's counts
        predictor = predictor[-1]
    limit = predictor.get("test_topk_per_image") if isinstance(predictor, DictConfig) else None
    return limit if isinstance(limit, int) else None


def _from_yacs(cfg: CfgNode) -> Recipe:
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    use_tta = cfg.TEST.AUG.ENABLED
    return Recipe(
        build_model=lambda: build_model(cfg),
        build_optimizer=lambda model: build_optimizer(cfg, model),
        build_lr_scheduler=lambda optimizer: build_lr_scheduler(cfg, optimizer),
        build_train_loader=functools.partial(_yacs_train_loader, cfg),
        test_sets=[_yacs_test_set(cfg, name) for name in cfg.DATASETS.TEST],
        train_names=tuple(cfg.DATASETS.TRAIN),
        num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        device=cfg.MODEL.DEVICE,
        seed=cfg.SEED,
        output_dir=cfg.OUTPUT_DIR,
        init_checkpoint=cfg.MODEL.WEIGHTS,
        max_iter=cfg.SOLVER.MAX_ITER,
        eval_period=cfg.TEST.EVAL_PERIOD,
        log_period=20,  # as in DefaultTrainer; yacs configs have no key for it
        checkpointer={"period": cfg.SOLVER.CHECKPOINT_PERIOD},
        amp=cfg.SOLVER.AMP.ENABLED,
        test_amp=cfg.TEST.AMP.ENABLED,
        max_skipped_steps=cfg.SOLVER.AMP.MAX_SKIPPED_STEPS,
        compile=cfg.SOLVER.COMPILE,
        ddp={"broadcast_buffers": False},
        max_bad_images=cfg.DATALOADER.MAX_BAD_IMAGES,
        max_nonfinite_steps=cfg.SOLVER.MAX_NONFINITE_STEPS,
        check_images=cfg.DATALOADER.CHECK_IMAGES,
        images=image_settings(cfg),
        precise_bn_iters=cfg.TEST.PRECISE_BN.NUM_ITER if cfg.TEST.PRECISE_BN.ENABLED else 0,
        wrap_for_test=lambda model: MaskScoringRCNNWithTTA(cfg, model) if use_tta else model,
        verify_results=lambda results: verify_results(cfg, results),
    )


def _yacs_train_loader(cfg: CfgNode, seed: int, first_iter: int, on_bad_images: Callable):
    arguments = build_detection_train_loader.from_config(cfg)
    return _train_loader(arguments, image_settings(cfg), seed, first_iter, on_bad_images)


def _check_engine(name: Optional[str]) -> Optional[str]:
    """The engine of an evaluator, or None for the default; a mistake shows before training."""
    try:
        return name and choose_engine(name)
    except ValueError as error:
        raise UserError(f"{error} (dataloader.evaluator.engine, yaml: TEST.COCO_ENGINE)") from error


def _yacs_test_set(cfg: CfgNode, name: str) -> TestSet:
    output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        output_dir = os.path.join(output_dir, name)
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    if kind != "coco":
        raise UserError(f"Dataset '{name}' is of type '{kind}'; only COCO's can be evaluated.")
    engine = _check_engine(cfg.TEST.COCO_ENGINE or None)
    # The model's, if it is more than COCO's 100; else the default
    limit = cfg.TEST.DETECTIONS_PER_IMAGE if cfg.TEST.DETECTIONS_PER_IMAGE > 100 else None
    limit = cfg.TEST.MAX_DETS_PER_IMAGE or limit
    return TestSet(
        names=(name,),
        build_loader=lambda: _yacs_test_loader(cfg, name),
        build_evaluator=lambda: MaskScoringCOCOEvaluator(
            name, output_dir=output_dir, engine=engine, max_dets_per_image=limit
        ),
        batch_size=cfg.DATALOADER.TEST_BATCH_SIZE,
    )


def _yacs_test_loader(cfg: CfgNode, name: str):
    arguments = build_detection_test_loader.from_config(cfg, name)
    # In later versions than 0.6 they have a sampler, which would fix the order of the images
    arguments.update(sampler=None, batch_size=cfg.DATALOADER.TEST_BATCH_SIZE)
    return build_test_loader(**_reading(arguments, image_settings(cfg)))


def _names(names) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)
