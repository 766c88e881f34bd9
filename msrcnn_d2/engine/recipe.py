"""One description of a run for both kinds of config, so that there is one training loop."""

import copy
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.modeling import PanopticFPN, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm

from msrcnn_d2_runtime.image_reading import ImageSettings

from ..config import has_mask_calibrator, target_of
from ..evaluation import (
    MaskScoringCityscapesEvaluator,
    MaskScoringCOCOEvaluator,
    MaskScoringLVISEvaluator,
    PanopticQualityEvaluator,
)
from ..evaluation.average_precision import choose_engine
from ..evaluation.coco_evaluator import check_settings
from ..image_reading import image_settings
from ..modeling import MaskScoringRCNNWithTTA, RetrofitRCNN
from ..utils.errors import UserError
from .configs import both_keys, builds_a, value_of
from .hooks import VALIDATION
from .keypoints import complete_keypoints
from .loaders import (
    build_test_loader,
    build_train_loader,
    fit_mask_format,
    reading_by,
    warn_of_other_loader,
)

__all__ = ["Recipe", "TestSet", "ValidationSet", "build_recipe"]

logger = logging.getLogger(__name__)

# What wrong arguments, or a file that is not there, make of building a loader or an evaluator
ERRORS_OF_ARGUMENTS = (
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, OSError),
    OmegaConfBaseException,
)
LOADER = "dataloader.test (yaml: DATASETS.TEST, DATALOADER)"
EVALUATOR = "dataloader.evaluator (yaml: TEST)"
# Evaluators of one dataset
OF_ONE_DATASET = (
    *(COCOEvaluator, LVISEvaluator, CityscapesInstanceEvaluator),
    *(SemSegEvaluator, COCOPanopticEvaluator),
)
# Those of them that write files; the files of two groups have different names
WRITING = (
    (COCOEvaluator, LVISEvaluator, MaskScoringCityscapesEvaluator),
    (SemSegEvaluator,),
    (COCOPanopticEvaluator,),
)


@dataclass
class TestSet:
    """
    Attributes:
        names: names of the datasets; empty if the config does not say.
        build_loader, build_evaluator: called for each evaluation. They raise a UserError for
            wrong arguments.
        batch_size: images per batch and process; None if the config does not say. For checks only.
        number: distinguishes test sets with the same names.
    """

    names: tuple[str, ...]
    build_loader: Callable[[], Any]
    build_evaluator: Callable[[], Any]
    batch_size: int | None = None
    number: int = 1

    def __str__(self) -> str:
        title = ", ".join(self.names) or "the test set"
        return title if self.number == 1 else f"{title} ({self.number})"

    def prepare(self) -> Any:
        """
        Build both now, so that mistakes show; the next evaluation uses what is built.

        Returns:
            the evaluator.

        Raises:
            UserError: one of them cannot be built.
        """
        evaluator = self.build_evaluator()
        self.build_evaluator = _given_once(evaluator, self.build_evaluator)
        self.build_loader = _given_once(self.build_loader(), self.build_loader)
        return evaluator


def _given_once(built: Any, build: Callable[[], Any]) -> Callable[[], Any]:
    """A function that first returns what has been built already, and then builds."""
    waiting = [built]
    return lambda: waiting.pop() if waiting else build()


@dataclass
class ValidationSet:
    """
    Attributes:
        names: names of the datasets.
        build_loader: returns the same loader each time, of batches of one image with its objects.
            It raises a UserError for wrong arguments.
    """

    names: tuple[str, ...]
    build_loader: Callable[[], Iterable]


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
        num_stuff_classes: number of classes of the semantic segmentation; None without one. For
            checks only.
        learns_stuff: whether it is trained.
        total_batch_size: images per iteration of all processes; None if the config does not say.
        seed: negative for a random one.
        eval_period, checkpoint_period, log_period, max_iter: in iterations.
        amp, test_amp: whether training and evaluation are in mixed precision.
        max_skipped_steps: in a row, by the gradient scaler of mixed precision.
        compile: whether `torch.compile` compiles what consists of layers only.
        max_bad_images: images that may be left out in training since they cannot be used.
        accumulation_steps: number of parts of a batch whose gradients are computed one after the
            other.
        freeze: regular expressions for names of parameters, see :func:`.freeze`.
        ema, ema_decay, ema_device: whether moving averages of the weights are evaluated and saved;
            see :class:`.WeightAverages`.
        evaluates_ema: whether they are also evaluated where nothing is trained, if a file has them.
        max_nonfinite_steps: steps that may be left out since their loss is not finite.
        detect_anomaly: whether PyTorch looks for the operation that gives the first NaN.
        check_images: whether to look at all images before training.
        images: how they are read.
        detections_per_image: of the model at most; None for no limit, or if the config does not
            say. For checks only.
        precise_bn_iters: iterations of precise batch norm before each evaluation, 0 for none.
        hooks, writers: of the user's own; see :mod:`msrcnn_d2.engine.user_hooks`.
        ddp: arguments of `create_ddp_model`.
        has_calibrator: whether the model has one, which is no part of a training.
        predicts_keypoints, num_keypoints: whether the model has a keypoint head, and how many it
            predicts; None if the config does not say. For checks only.
        keypoint_names, keypoint_flip_map: those of the datasets; None for those in their files.
        verify_results: called with the results at the end of a run.
        val_metric, val_mode, patience, min_delta: see :class:`BestCheckpointer`.
        validation_set: what the validation loss is computed on; None for no such loss.
    """

    build_model: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], Any]
    build_lr_scheduler: Callable[[Any], Any]
    build_train_loader: Callable[[int, int, Callable], Any]
    test_sets: list[TestSet]
    train_names: tuple[str, ...]
    num_classes: int | None
    total_batch_size: int | None
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
    accumulation_steps: int = 1
    freeze: Sequence[str] = ()
    ema: bool = False
    ema_decay: float = 0.999
    ema_device: str = ""
    evaluates_ema: bool = True
    detect_anomaly: bool = False
    check_images: bool = True
    images: ImageSettings = field(default_factory=ImageSettings)
    detections_per_image: int | None = None
    precise_bn_iters: int = 0
    num_stuff_classes: int | None = None
    learns_stuff: bool = False
    hooks: Sequence[Any] = ()
    writers: Sequence[Any] = ()
    has_calibrator: bool = False
    predicts_keypoints: bool = False
    num_keypoints: int | None = None
    keypoint_names: Sequence[str] | None = None
    keypoint_flip_map: Sequence[Sequence[str]] | None = None
    wrap_for_test: Callable[[nn.Module], nn.Module] = lambda model: model
    verify_results: Callable[[dict], Any] = lambda results: None
    val_metric: str = ""
    val_mode: str = "max"
    patience: int = 0
    min_delta: float = 0.0
    validation_set: ValidationSet | None = None

    @property
    def evaluates_on_its_way(self) -> bool:
        """Whether there are evaluations before the one at the end."""
        has_images = bool(self.test_sets) or self.validation_set is not None
        return has_images and 0 < self.eval_period < self.max_iter


def build_recipe(cfg: DictConfig | CfgNode) -> Recipe:
    """
    Args:
        cfg: a training config of either kind. A LazyConfig has what Detectron2's
            `tools/lazyconfig_train_net.py` expects.
    """
    recipe = _from_yacs(cfg) if isinstance(cfg, CfgNode) else _from_lazy(cfg)
    recipe.validation_set = _validation_set(cfg, recipe.test_sets)
    # Results of several test sets have their names in front
    titles = [str(test_set) for test_set in recipe.test_sets]
    if recipe.val_metric and len(titles) > 1:
        if not recipe.val_metric.startswith((f"{VALIDATION}/", *(f"{x}/" for x in titles))):
            recipe.val_metric = f"{titles[0]}/{recipe.val_metric}"
    return recipe


def _settings(cfg: DictConfig | CfgNode) -> dict[str, Any]:
    """The attributes of a recipe that both kinds of config say in one key."""
    names = (
        *("device", "seed", "output_dir", "init_checkpoint", "max_iter", "eval_period"),
        *("log_period", "compile", "max_bad_images", "max_nonfinite_steps", "detect_anomaly"),
        *("check_images", "accumulation_steps"),
    )
    is_panoptic = builds_a(PanopticFPN, cfg)
    return {
        "hooks": value_of(cfg, "train.hooks") or (),
        "writers": value_of(cfg, "train.writers") or (),
        "freeze": value_of(cfg, "train.freeze") or (),
        **{name: value_of(cfg, f"train.{name}") for name in names},
        "amp": value_of(cfg, "train.amp.enabled"),
        "test_amp": value_of(cfg, "train.amp.test"),
        "max_skipped_steps": value_of(cfg, "train.amp.max_skipped_steps"),
        "ema": value_of(cfg, "train.model_ema.enabled"),
        "ema_decay": value_of(cfg, "train.model_ema.decay"),
        "ema_device": value_of(cfg, "train.model_ema.device"),
        "evaluates_ema": value_of(cfg, "train.model_ema.use_ema_weights_for_eval_only"),
        "num_classes": value_of(cfg, "model.roi_heads.num_classes"),
        "num_stuff_classes": value_of(cfg, "model.sem_seg_head.num_classes")
        if is_panoptic
        else None,
        "learns_stuff": is_panoptic and not builds_a(RetrofitRCNN, cfg),
        "has_calibrator": has_mask_calibrator(cfg),
        "predicts_keypoints": _predicts_keypoints(cfg),
        "keypoint_names": value_of(cfg, "dataloader.keypoints.names"),
        "keypoint_flip_map": value_of(cfg, "dataloader.keypoints.flip_map"),
        "total_batch_size": value_of(cfg, "dataloader.train.total_batch_size"),
        "images": image_settings(cfg),
        "val_metric": value_of(cfg, "train.best_checkpointer.val_metric") or "",
        "val_mode": value_of(cfg, "train.best_checkpointer.mode"),
        "patience": value_of(cfg, "train.early_stopping.patience"),
        "min_delta": value_of(cfg, "train.early_stopping.min_delta"),
    }


def _from_lazy(cfg: DictConfig) -> Recipe:
    settings = _settings(cfg)
    images = settings["images"]
    train_names = _names(cfg, "dataloader.train.dataset.names")

    def build_lazy_optimizer(model: nn.Module) -> Any:
        cfg.optimizer.params.model = model
        with _one_sentence("optimizer"):
            return instantiate(cfg.optimizer)

    return Recipe(
        build_model=lambda: instantiate(cfg.model),
        build_optimizer=build_lazy_optimizer,
        build_lr_scheduler=lambda optimizer: instantiate(cfg.lr_multiplier),
        build_train_loader=functools.partial(
            _lazy_train_loader,
            cfg.dataloader.train,
            images,
            train_names if settings["predicts_keypoints"] else (),
        ),
        test_sets=_lazy_test_sets(cfg, images),
        train_names=train_names,
        checkpointer=dict(cfg.train.checkpointer),
        ddp=dict(cfg.train.ddp),
        detections_per_image=_detections_per_image(cfg),
        num_keypoints=OmegaConf.select(cfg, "model.roi_heads.keypoint_head.num_keypoints"),
        **settings,
    )


def _validation_set(
    cfg: DictConfig | CfgNode, test_sets: Sequence[TestSet]
) -> ValidationSet | None:
    if not value_of(cfg, "train.validation_loss.enabled"):
        return None
    name = value_of(cfg, "train.validation_loss.dataset")
    names = (name,) if name else tuple(dict.fromkeys(n for t in test_sets for n in t.names))
    if not names:
        raise UserError(
            "There is nothing to compute the validation loss on: set "
            f"{both_keys('train.validation_loss.dataset', 'NAME')}."
        )

    @functools.cache
    def build_loader() -> Iterable:
        with _one_sentence(both_keys("train.validation_loss.dataset")):
            of_kind = _yacs_validation if isinstance(cfg, CfgNode) else _lazy_validation
            mapper, num_workers = of_kind(cfg)
            dicts = get_detection_dataset_dicts(list(names), filter_empty=False)
            if any("annotations" not in d for d in dicts):
                raise ValueError(f"{', '.join(names)} has images without a list of annotations")
            number = value_of(cfg, "train.validation_loss.num_images")
            if 0 < number < len(dicts):
                dicts = [dicts[k * len(dicts) // number] for k in range(number)]
            fit_mask_format(mapper, dicts)
            complete_keypoints(mapper, dicts, names if _predicts_keypoints(cfg) else ())
            arguments = reading_by(image_settings(cfg), {"mapper": mapper})
            return build_test_loader(dicts, num_workers=num_workers, **arguments)

    return ValidationSet(names, build_loader)


def _lazy_validation(cfg: DictConfig) -> tuple[Callable, int]:
    """The mapper of the training, with the augmentation of the first test; number of workers."""
    training = cfg.dataloader.train.get("mapper")
    test = _as_list(cfg.dataloader, "test")[0] if cfg.dataloader.get("test") else OmegaConf.create()
    augmentations = OmegaConf.select(test, "mapper.augmentations")
    if augmentations is None or training is None or "augmentations" not in training:
        raise ValueError(
            "dataloader.train.mapper and dataloader.test.mapper need `augmentations`, as "
            "Detectron2's DatasetMapper has them"
        )
    arguments = {str(k): instantiate(v) for k, v in training.items() if k != "_target_"}
    arguments["augmentations"] = instantiate(augmentations)
    return target_of(training)(**arguments), test.get("num_workers", 0)


def _predicts_keypoints(cfg: DictConfig | CfgNode) -> bool:
    if isinstance(cfg, CfgNode):
        return cfg.MODEL.KEYPOINT_ON
    return OmegaConf.select(cfg, "model.roi_heads.keypoint_head") is not None


def _lazy_train_loader(
    loader: DictConfig,
    images: ImageSettings,
    with_keypoints: Sequence[str],
    seed: int,
    first_iter: int,
    on_bad_images: Callable,
) -> Iterable:
    """
    Args:
        with_keypoints: names of the datasets if the model predicts keypoints, else empty.
    """
    if target_of(loader) is not build_detection_train_loader:
        warn_of_other_loader("dataloader.train is a loader of your own")
        return target_of(loader)(**reading_by(images, _arguments_of(loader)))
    arguments = _arguments_of(loader)
    complete_keypoints(arguments["mapper"], arguments["dataset"], with_keypoints)
    return build_train_loader(arguments, images, seed, first_iter, on_bad_images)


def _arguments_of(loader: DictConfig) -> dict[str, Any]:
    return {str(k): instantiate(v) for k, v in loader.items() if k != "_target_"}


def _lazy_test_sets(cfg: DictConfig, images: ImageSettings) -> list[TestSet]:
    if cfg.dataloader.get("test") is None or cfg.dataloader.get("evaluator") is None:
        return []
    tests = _as_list(cfg.dataloader, "test")
    # The config stays what the user gave, since it is saved
    evaluators = _as_list(copy.deepcopy(cfg.dataloader), "evaluator")
    if len(tests) != len(evaluators) and (len(tests) != 1 or not evaluators):
        raise UserError(
            f"dataloader.test has {len(tests)} loaders and dataloader.evaluator "
            f"{len(evaluators)} evaluators: give each loader one, or a single loader several."
        )
    with _one_sentence(LOADER):
        names_of = [_names(test, "dataset.names", "dataloader.test.") for test in tests]
    with _one_sentence(EVALUATOR):
        for evaluator in evaluators:
            _check_engine(evaluator.get("engine") if isinstance(evaluator, DictConfig) else None)
        _complete(evaluators, cfg)
    # One loader may have several evaluators; several loaders have one each
    shares = [evaluators] if len(tests) == 1 else [[x] for x in evaluators]
    test_sets: list[TestSet] = []
    for test, names, share in zip(tests, names_of, shares):
        if len(names) > 1 and any(_is_one_of(OF_ONE_DATASET, x) for x in share):
            raise UserError(
                f"dataloader.test.dataset.names has {len(names)} datasets ({', '.join(names)}), "
                "but an evaluator takes one: make dataloader.test and dataloader.evaluator "
                "lists, with a loader and an evaluator for each."
            )
        predicts_keypoints = _predicts_keypoints(cfg)
        test_sets.append(
            TestSet(
                names=names,
                build_loader=functools.partial(_lazy_test_loader, test, images),
                build_evaluator=functools.partial(_lazy_evaluators, share, predicts_keypoints),
                batch_size=test.get("batch_size"),
                number=1 + sum(other.names == names for other in test_sets),
            )
        )
    return test_sets


def _as_list(dataloader: DictConfig, key: str) -> list:
    """One or several descriptions; an evaluator may also be an object."""
    node = dataloader[key]
    nodes = list(node) if isinstance(node, ListConfig) else [node]
    for x in nodes:
        is_object = key == "evaluator" and hasattr(x, "evaluate")
        if not ("_target_" in x if isinstance(x, DictConfig) else is_object):
            raise UserError(
                f"dataloader.{key} is {x!r}, but takes a LazyCall of what to build, or a list of "
                "them."
            )
    return nodes


def _is_one_of(kinds: tuple[type, ...], evaluator: Any) -> bool:
    target = target_of(evaluator) if isinstance(evaluator, DictConfig) else None
    return isinstance(target, type) and issubclass(target, kinds)


def _complete(evaluators: list, cfg: DictConfig) -> None:
    """Set where evaluators write and how many detections count, if the user has not."""
    limit = _detections_per_image(cfg)
    for evaluator in evaluators:
        if _is_one_of(OF_ONE_DATASET, evaluator):
            # A list of one dataset is as good as its name
            names = _names(evaluator, "dataset_name", "dataloader.evaluator.")
            if len(names) == 1:
                evaluator.dataset_name = names[0]
        if _is_one_of((COCOEvaluator,), evaluator) and limit is not None and limit > 100:
            if evaluator.get("max_dets_per_image") is None:
                evaluator.max_dets_per_image = limit
    for kinds in WRITING:
        _choose_folders([x for x in evaluators if _is_one_of(kinds, x)], cfg)


def _choose_folders(evaluators: list[DictConfig], cfg: DictConfig) -> None:
    """
    Args:
        evaluators: which would write over each other's files in one folder.
    """
    folders: Counter = Counter()
    for evaluator in evaluators:
        if evaluator.get("output_dir") is None:
            folder = os.path.join(cfg.train.output_dir, "inference")
            if len(evaluators) > 1:
                names = _names(evaluator, "dataset_name", "dataloader.evaluator.")
                folder = os.path.join(folder, ", ".join(names))
            folders[folder] += 1
            number = folders[folder]
            evaluator.output_dir = folder if number == 1 else f"{folder} ({number})"
    number_of = Counter(evaluator.output_dir for evaluator in evaluators)
    shared = next((folder for folder, number in number_of.items() if number > 1), None)
    if shared is not None:
        raise UserError(
            f"{number_of[shared]} evaluators write their files into '{shared}', over each other's: "
            "give each its own dataloader.evaluator.output_dir, or none."
        )


def _lazy_evaluators(nodes: list, predicts_keypoints: bool) -> Any:
    """The evaluator of a loader; Detectron2's `DatasetEvaluators` if it has several."""
    evaluators = []
    for node in nodes:
        with _one_sentence(EVALUATOR):
            if _is_one_of(OF_ONE_DATASET, node):
                _check_dataset_of_evaluator(node)
            if _is_one_of((COCOPanopticEvaluator,), node):
                _check_panopticapi(node)
            evaluators.append(instantiate(node))
            if isinstance(evaluators[-1], COCOEvaluator):
                check_settings(evaluators[-1], predicts_keypoints)
    return _together(evaluators)


def _together(evaluators: list) -> Any:
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _check_dataset_of_evaluator(node: DictConfig) -> None:
    name = node.get("dataset_name")
    if isinstance(name, ListConfig):
        raise UserError(
            f"dataloader.evaluator.dataset_name is {name!r}, but an evaluator takes one "
            "dataset: make dataloader.evaluator a list, with an evaluator for each."
        )
    known = name in DatasetCatalog.list() or (
        name in MetadataCatalog.list() and MetadataCatalog.get(name).get("json_file")
    )
    if name is not None and not known:
        raise UserError(
            f"dataloader.evaluator.dataset_name is '{name}', a dataset that is not known: give "
            "the one of dataloader.test.dataset.names, or register it with --dataset."
        )


def _check_panopticapi(node: DictConfig) -> None:
    """Detectron2's own evaluator would miss it after the first image."""
    if not _is_one_of((PanopticQualityEvaluator,), node) and find_spec("panopticapi") is None:
        raise UserError(
            f"{target_of(node).__name__} needs the package panopticapi, which is not on PyPI: "
            "install it by `pip install git+https://github.com/cocodataset/panopticapi.git`, or "
            "use msrcnn_d2.evaluation.PanopticQualityEvaluator, which needs only `pip install "
            "hotcoco`."
        )


def _lazy_test_loader(loader: DictConfig, images: ImageSettings) -> Iterable:
    with _one_sentence(LOADER):
        build = target_of(loader)
        arguments = reading_by(images, _arguments_of(loader))
        return (build_test_loader if build is build_detection_test_loader else build)(**arguments)


@contextmanager
def _one_sentence(key: str) -> Iterator[None]:
    """Make a UserError of what wrong arguments raise."""
    try:
        yield
    except ERRORS_OF_ARGUMENTS as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = (str(error).strip().splitlines() or ["no reason is given"])[0].rstrip(".")
        raise UserError(f"{key} cannot be built: {kind}{message}.") from error


def _detections_per_image(cfg: DictConfig) -> int | None:
    """How many the model gives at most; None for no limit, or if the config does not say."""
    predictor = OmegaConf.select(cfg, "model.roi_heads.box_predictor")
    if isinstance(predictor, ListConfig):  # Cascade: the last stage's counts
        predictor = predictor[-1]
    if not isinstance(predictor, DictConfig):
        return None
    limit = predictor.get("test_topk_per_image", 100)  # the default of Detectron2
    # Detectron2 takes a negative one for no limit
    return limit if isinstance(limit, int) and limit >= 0 else None


def _from_yacs(cfg: CfgNode) -> Recipe:
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    use_tta = cfg.TEST.AUG.ENABLED
    if use_tta and builds_a(PanopticFPN, cfg):
        raise UserError(
            "Test-time augmentation merges instances only, and the model is a Panoptic FPN: set "
            "TEST.AUG.ENABLED False."
        )
    if use_tta and cfg.MODEL.KEYPOINT_ON:
        raise UserError(
            "Test-time augmentation does not know keypoints: set TEST.AUG.ENABLED=False."
        )
    return Recipe(
        build_model=lambda: build_model(cfg),
        build_optimizer=lambda model: build_optimizer(cfg, model),
        build_lr_scheduler=lambda optimizer: build_lr_scheduler(cfg, optimizer),
        build_train_loader=functools.partial(_yacs_train_loader, cfg),
        test_sets=[_yacs_test_set(cfg, name) for name in dict.fromkeys(cfg.DATASETS.TEST)],
        train_names=tuple(cfg.DATASETS.TRAIN),
        checkpointer={"period": cfg.SOLVER.CHECKPOINT_PERIOD},
        ddp={"broadcast_buffers": False},
        detections_per_image=limit if limit >= 0 else None,
        precise_bn_iters=cfg.TEST.PRECISE_BN.NUM_ITER if cfg.TEST.PRECISE_BN.ENABLED else 0,
        wrap_for_test=lambda model: MaskScoringRCNNWithTTA(cfg, model) if use_tta else model,
        verify_results=lambda results: verify_results(cfg, results),
        num_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
        **_settings(cfg),
    )


def _yacs_validation(cfg: CfgNode) -> tuple[Callable, int]:
    """The mapper of the training, with the augmentation of the test; number of workers."""
    augmentations = build_augmentation(cfg, is_train=False)
    # Boxes are recomputed only where augmentation cuts objects
    mapper = DatasetMapper(cfg, augmentations=augmentations, recompute_boxes=False)
    return mapper, cfg.DATALOADER.NUM_WORKERS


def _yacs_train_loader(
    cfg: CfgNode, seed: int, first_iter: int, on_bad_images: Callable
) -> Iterable:
    arguments = build_detection_train_loader.from_config(cfg)
    complete_keypoints(arguments["mapper"], arguments["dataset"])
    return build_train_loader(arguments, image_settings(cfg), seed, first_iter, on_bad_images)


def _check_engine(name: str | None) -> None:
    """Check the engine of an evaluator, None for the default, before training."""
    try:
        if name:
            choose_engine(name)
    except ValueError as error:
        raise UserError(f"{error} (dataloader.evaluator.engine, yaml: TEST.COCO_ENGINE)") from error


def _coco_evaluator(cfg: CfgNode, name: str, output_dir: str) -> DatasetEvaluator:
    # As many as the model gives, if these are more than COCO's 100
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    evaluator = MaskScoringCOCOEvaluator(
        name,
        output_dir=output_dir,
        engine=cfg.TEST.COCO_ENGINE or None,
        max_dets_per_image=cfg.TEST.MAX_DETS_PER_IMAGE or (limit if limit > 100 else None),
        boundary_ap=cfg.TEST.BOUNDARY_AP,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )
    check_settings(evaluator, predicts_keypoints=cfg.MODEL.KEYPOINT_ON)
    return evaluator


def _lvis_evaluator(cfg: CfgNode, name: str, output_dir: str) -> DatasetEvaluator:
    limit = cfg.TEST.MAX_DETS_PER_IMAGE or None
    return MaskScoringLVISEvaluator(name, output_dir=output_dir, max_dets_per_image=limit)


def _cityscapes_evaluator(cfg: CfgNode, name: str, output_dir: str) -> DatasetEvaluator:
    return MaskScoringCityscapesEvaluator(name, output_dir)


# What builds the evaluators of a test set in a yaml config, by the "evaluator_type" in its
# metadata, as in Detectron2's tools/train_net.py. Each is called with the config, the name of the
# dataset and the folder for files, when the evaluation begins
EVALUATORS_OF: dict[str, Sequence[Callable[[CfgNode, str, str], DatasetEvaluator]]] = {
    "coco": (_coco_evaluator,),
    "lvis": (_lvis_evaluator,),
    "cityscapes_instance": (_cityscapes_evaluator,),
    "coco_panoptic_seg": (
        _coco_evaluator,
        lambda cfg, name, output_dir: SemSegEvaluator(name, output_dir=output_dir),
        lambda cfg, name, output_dir: PanopticQualityEvaluator(name, output_dir),
    ),
}


def _yacs_test_set(cfg: CfgNode, name: str) -> TestSet:
    output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        output_dir = os.path.join(output_dir, name)
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    if kind not in EVALUATORS_OF:
        raise UserError(
            f"Dataset '{name}' has the evaluator_type '{kind}', but a yaml config evaluates only "
            f"{', '.join(EVALUATORS_OF)}: change DATASETS.TEST, or use a LazyConfig with an "
            "evaluator of your own."
        )
    if cfg.TEST.BOUNDARY_AP and not kind.startswith("coco"):
        raise UserError(
            f"TEST.BOUNDARY_AP is True, but dataset '{name}' has the evaluator_type '{kind}': "
            "Boundary AP is for COCO's datasets only."
        )
    _check_engine(cfg.TEST.COCO_ENGINE or None)

    def build_evaluator() -> Any:
        with _one_sentence(EVALUATOR):
            return _together([build(cfg, name, output_dir) for build in EVALUATORS_OF[kind]])

    def build_loader() -> Iterable:
        with _one_sentence(LOADER):
            arguments = build_detection_test_loader.from_config(cfg, name)
            # Versions after 0.6 give a sampler, which would fix the order of the images
            arguments.update(sampler=None, batch_size=cfg.DATALOADER.TEST_BATCH_SIZE)
            return build_test_loader(**reading_by(image_settings(cfg), arguments))

    return TestSet(
        names=(name,),
        build_loader=build_loader,
        build_evaluator=build_evaluator,
        batch_size=cfg.DATALOADER.TEST_BATCH_SIZE,
    )


def _names(node: DictConfig, key: str, prefix: str = "") -> tuple[str, ...]:
    """
    Names of datasets under a key of a config, which may have none, one or a list.

    Args:
        prefix: of the key, if `node` is a part of `dataloader`. A list must not be empty there.
    """
    names = OmegaConf.select(node, key)
    if names is None:
        return ()
    found = (names,) if isinstance(names, str) else names
    is_list = isinstance(found, (tuple, ListConfig)) and all(isinstance(x, str) for x in found)
    if not is_list or (prefix and not found):
        raise UserError(
            f"{prefix}{key} is {names!r}, but takes a dataset's name, or a list of them."
        )
    if isinstance(names, str) and names.strip()[:1] in ("[", "(") and names not in DatasetCatalog:
        raise UserError(
            f"{prefix}{key} is the text '{names}', but takes a list: leave out its quotes."
        )
    return tuple(found)
