"""
Checks before the first iteration: what would fail after hours fails now, in one sentence.

:func:`check_recipe` is for the settings, :func:`check_data` for the datasets, and
:func:`check_names_of_weights` for the classes of the weights, once they are loaded.
"""

import difflib
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from msrcnn_d2_runtime.text import listed, plural

from ..checkpoint.checkpointer import BEST, numbered_checkpoints
from ..class_names import difference, obstacle, same
from ..dataset_check import Finding, Findings, Level, check_dataset
from ..dataset_check.issues import BAD_IMAGES
from ..utils.errors import UserError
from .configs import both_keys
from .hooks import VALIDATION
from .keypoints import check_keypoints
from .recipe import Recipe
from .user_hooks import check_hooks_and_writers

__all__ = [
    "check_data",
    "check_names_of_weights",
    "check_number",
    "check_output_dir",
    "check_recipe",
    "check_registered",
    "dicts_of_dataset",
    "keep_config_of_training",
    "names_of_dataset",
    "names_of_training",
    "refuse_other_run",
]

logger = logging.getLogger(__name__)

# Detectron2 registers these when it is imported. They lie below DETECTRON2_DATASETS
OF_DETECTRON2 = frozenset(DatasetCatalog.list())
ADVICE = "Give the categories of all annotation files the same names and the same order of ids."
NUM_SHOWN = 2  # examples of each kind
# Errors that do not matter for training
ONLY_IN_EVALUATION = ("area", "polygon-points")
# Errors that a change of the config fixes. Their messages say which change
BY_SETTINGS = ("image-orientation", "image-pixels", "image-deep", "image-deep-color")
# A few wrong boxes are noise. If there are more, all were written in another format
MOST_WRONG_BOXES = 0.01


def check_recipe(recipe: Recipe, num_processes: int, training: bool) -> None:
    """
    Check that the datasets exist and fit the model, that the output folder can be written, that
    there is a compiler if one is needed, that batches divide evenly, that hooks and writers of the
    user's own can be called, and that no calibrator is trained.

    Args:
        num_processes: of the whole job.
        training: whether the run trains. Otherwise only what an evaluation needs is checked.

    Raises:
        UserError: the first check that fails, with what to do about it.
    """
    check_output_dir(recipe.output_dir)
    # On a CPU torch.compile calls $CXX or g++; for a GPU it brings its own compiler
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    if recipe.compile and recipe.device == "cpu" and not shutil.which(compiler):
        raise UserError(
            f"train.compile (yaml: SOLVER.COMPILE) needs a C++ compiler, but there is no "
            f"'{compiler}': install it, set CXX to another one, or leave train.compile at False."
        )
    if training and recipe.has_calibrator:
        raise UserError(
            "The model has a calibrator, which is fitted after the training: train with the config "
            "that the model had before, and run `msrcnn-d2 calibrate` again."
        )
    if training:
        check_hooks_and_writers(recipe)
    if not training and not recipe.test_sets:
        raise UserError(
            "There is nothing to evaluate on: the config has no dataloader.test and "
            "dataloader.evaluator (yaml: DATASETS.TEST)."
        )
    trained_on = [*recipe.train_names, *_validation_names(recipe)] if training else []
    for name in dict.fromkeys(trained_on + [n for t in recipe.test_sets for n in t.names]):
        # Classes of a test set are found by name. Without names of a training set, numbers decide
        names_matter = name in trained_on or (training and not trained_on)
        check_registered(name, recipe.num_classes if names_matter else None)
        if recipe.num_stuff_classes is not None:
            must_have = recipe.learns_stuff and name in trained_on
            _check_stuff(name, recipe.num_stuff_classes, must_have)
    check_names_of_datasets(recipe, training)
    if recipe.predicts_keypoints:
        check_keypoints(
            list(dict.fromkeys(trained_on + [n for t in recipe.test_sets for n in t.names])),
            trained_on,
            recipe.num_keypoints,
            recipe.keypoint_names,
            recipe.keypoint_flip_map,
        )
    for size in (test_set.batch_size for test_set in recipe.test_sets):
        if size is not None and not (isinstance(size, int) and size >= 1):
            raise UserError(
                f"The batch size for evaluation is {size}, but has to be a whole number of at "
                "least 1: change dataloader.test.batch_size (yaml: DATALOADER.TEST_BATCH_SIZE)."
            )
    if training:
        _check_metric(recipe)
    batch = recipe.total_batch_size
    if training and batch and batch % num_processes:
        raise UserError(
            f"A batch of {batch} images cannot be divided evenly among {num_processes} processes: "
            "change dataloader.train.total_batch_size (yaml: SOLVER.IMS_PER_BATCH)."
        )
    parts = recipe.accumulation_steps
    if training and batch and batch // num_processes % parts:
        raise UserError(
            f"The {plural(batch // num_processes, 'image')} that each process has in an iteration "
            f"cannot be split into {parts} equal parts: change train.accumulation_steps (yaml: "
            "SOLVER.ACCUMULATION_STEPS) or dataloader.train.total_batch_size (yaml: "
            "SOLVER.IMS_PER_BATCH)."
        )


def _validation_names(recipe: Recipe) -> tuple[str, ...]:
    return recipe.validation_set.names if recipe.validation_set else ()


def _check_metric(recipe: Recipe) -> None:
    """
    Raises:
        UserError: the settings of the best checkpoint and of early stopping contradict others.
    """
    name, metric = "train.best_checkpointer.val_metric", recipe.val_metric
    if recipe.patience and not metric:
        raise UserError(f"Early stopping needs a result to look at: set {both_keys(name, 'NAME')}.")
    if recipe.patience and not recipe.evaluates_on_its_way:
        raise UserError(
            "Early stopping needs a test set and evaluations during the training: set "
            f"{both_keys('train.eval_period', 'N')} to less than its {recipe.max_iter} iterations."
        )
    if metric.startswith(f"{VALIDATION}/") and recipe.validation_set is None:
        raise UserError(
            f"There is no {metric} without the validation loss: set "
            f"{both_keys('train.validation_loss.enabled', True)}, or another {both_keys(name)}."
        )
    if metric.startswith(f"{VALIDATION}/") and recipe.val_mode == "max":
        raise UserError(
            f"The lowest {metric} is the best: set "
            f"{both_keys('train.best_checkpointer.mode', 'min')}."
        )


def check_output_dir(path: str) -> None:
    """
    Raises:
        UserError: the folder cannot be written.
    """
    try:
        PathManager.mkdirs(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"Cannot write to the output folder '{path}' ({error.strerror}): set train.output_dir "
            "(yaml: OUTPUT_DIR) to another one."
        ) from error


def refuse_other_run(output_dir: str) -> None:
    """
    Keep a new training from mixing its checkpoints and metrics with those of an earlier one.

    Raises:
        UserError: the folder has checkpoints of a training.
    """
    unnumbered = (os.path.join(output_dir, f"{name}.pth") for name in ("model_final", BEST))
    found = [path for path in unnumbered if os.path.exists(path)]
    found += [path for _, path in numbered_checkpoints(output_dir)]
    if found:
        raise UserError(
            f"'{output_dir}' holds the checkpoints of another run "
            f"('{os.path.basename(found[0])}'): continue it with --resume, or set "
            "train.output_dir (yaml: OUTPUT_DIR) to another folder."
        )


@contextmanager
def keep_config_of_training(output_dir: str) -> Iterator[None]:
    """
    Around Detectron2's `default_setup`, which would overwrite the config of the training with that
    of the evaluation. In this context it writes into `inference/`, beside the results.
    """
    written = os.path.join(output_dir, "config.yaml")
    aside = os.path.join(output_dir, "config_of_training.yaml")
    if not comm.is_main_process():
        yield
        return
    if os.path.exists(written):
        shutil.copyfile(written, aside)  # not moved: the evaluation may read its config from it
    try:
        yield
        if os.path.exists(written):
            os.makedirs(os.path.join(output_dir, "inference"), exist_ok=True)
            os.replace(written, os.path.join(output_dir, "inference", "config.yaml"))
    finally:
        if os.path.exists(aside):
            os.replace(aside, written)


def check_registered(name: str, num_classes: int | None = None) -> None:
    """
    Args:
        num_classes: that the dataset should have, if that matters.

    Raises:
        UserError: there is no such dataset, its files are missing, or it has another number of
            classes.
    """
    if name not in DatasetCatalog.list():
        nearest = difflib.get_close_matches(name, DatasetCatalog.list(), n=2)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "."
        raise UserError(
            f"Dataset '{name}' is not known{hint} Register one of your own with "
            f"--dataset {name} ANNOTATIONS.json IMAGES/."
        )
    metadata = MetadataCatalog.get(name)
    _check_paths(name, metadata)
    if not hasattr(metadata, "thing_classes"):
        dicts_of_dataset(name)
    if num_classes is not None:
        check_number(name, metadata.get("thing_classes") or [], num_classes)


def _check_stuff(name: str, num_classes: int, must_have: bool) -> None:
    """
    Args:
        must_have: whether a dataset without semantic segmentation is a mistake.
    """
    metadata = MetadataCatalog.get(name)
    names = metadata.get("stuff_classes")
    if names is None and must_have and metadata.get("evaluator_type") == "coco":
        raise UserError(
            f"Dataset '{name}' has objects only, but a Panoptic FPN also learns semantic "
            "segmentation: register a dataset that has both by Detectron2's "
            "register_coco_panoptic_separated."
        )
    if names is not None and len(names) != num_classes:
        raise UserError(
            f"Dataset '{name}' has {len(names)} classes of stuff ({listed(names)}), of which the "
            f"first stands for all objects, but the model predicts {num_classes}: set "
            f"model.sem_seg_head.num_classes={len(names)} (yaml: MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"{len(names)})."
        )


def dicts_of_dataset(name: str) -> list[dict]:
    """
    The dataset dicts of a registered dataset; Detectron2 learns its categories with them.

    Raises:
        UserError: they cannot be read.
    """
    try:
        return DatasetCatalog.get(name)
    except Exception as error:  # of any type, depending on what is wrong with the file
        file = MetadataCatalog.get(name).get("json_file")
        if file:
            findings = check_dataset(PathManager.get_local_path(file), None)
            _refuse(name, findings.of(Level.ERROR), [], 0, "")
        raise UserError(
            f"Dataset '{name}' cannot be read from '{file}' ({type(error).__name__}: {error}): "
            "give a file in COCO's format."
        ) from error


def _check_paths(name: str, metadata: Any) -> None:
    if name in OF_DETECTRON2:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        path = str(metadata.get("json_file") or metadata.get("gt_dir") or "coco/")
        folder = os.path.relpath(path, root).split(os.sep)[0]
        advice = (
            f"Set DETECTRON2_DATASETS (now '{root}') to the folder that contains {folder}/, or "
            "register your own data with --dataset."
        )
    else:
        advice = "Correct the path, such as the one given with --dataset."
    # Cityscapes has folders of both, with other names
    json_file, gt_dir = metadata.get("json_file"), metadata.get("gt_dir")
    image_root = metadata.get("image_root") or metadata.get("image_dir")
    if json_file and not PathManager.isfile(json_file):
        raise UserError(f"Annotations of dataset '{name}' are not at '{json_file}'. {advice}")
    if gt_dir and not PathManager.isdir(gt_dir):
        raise UserError(f"Annotations of dataset '{name}' are not in '{gt_dir}'. {advice}")
    stuff_root = metadata.get("sem_seg_root")
    if stuff_root and not PathManager.isdir(stuff_root):
        raise UserError(
            f"The semantic segmentation of dataset '{name}' is not in '{stuff_root}'. {advice}"
        )
    if image_root and not (PathManager.isdir(image_root) and PathManager.ls(image_root)):
        raise UserError(f"Images of dataset '{name}' are not in '{image_root}'. {advice}")


# ---- datasets


def check_data(recipe: Recipe, training: bool, image_ids: Collection[Any] | None = None) -> None:
    """
    Check the datasets that are in COCO's format, on the main process, and log what is found.

    Training may leave out up to `max_bad_images` images that cannot be used, an evaluation none.

    Args:
        image_ids: ids of the images that are used; None for all.

    Raises:
        UserError: training or evaluation would fail, or the model would learn nonsense.
    """
    if not comm.is_main_process():
        return
    # The losses need annotations that can be trained on, too
    validation_names = _validation_names(recipe) if training else ()
    train_names = [*recipe.train_names, *validation_names] if training else []
    test_names = [name for test_set in recipe.test_sets for name in test_set.names]
    for name in dict.fromkeys([*train_names, *test_names]):
        metadata = MetadataCatalog.get(name)
        # The objects of a panoptic dataset are in the same format
        is_of_coco = metadata.get("evaluator_type") in ("coco", "coco_panoptic_seg")
        if not (is_of_coco and metadata.get("json_file")):
            continue
        title = f"dataset '{name}'"
        if image_ids is not None:
            title = f"{plural(len(image_ids), 'image')} of {title}"
        logger.info("Checking %s ...", title)
        is_trained_on, is_tested_on = name in train_names, name in test_names
        json_file, image_root = metadata.json_file, metadata.get("image_root")
        looks_at_images = recipe.check_images and image_root
        findings = check_dataset(
            PathManager.get_local_path(json_file),
            PathManager.get_local_path(image_root) if looks_at_images else None,
            quick=True,
            needs_annotations=is_trained_on,
            settings=recipe.images,
            image_ids=image_ids,
        )
        if not is_tested_on:
            findings.all = [f for f in findings.all if f.kind not in ONLY_IN_EVALUATION]
        if not is_trained_on:
            _check_that_there_are_objects(title, findings, training)
        _log(name, findings, recipe.detections_per_image)
        errors = [f for f in findings.of(Level.ERROR) if f.kind not in BAD_IMAGES]
        wrong_boxes = sum(f.kind == "box-elsewhere" for f in errors)
        if not is_trained_on or wrong_boxes <= MOST_WRONG_BOXES * findings.num_annotations:
            errors = [f for f in errors if f.kind != "box-elsewhere"]
        if is_tested_on or name in validation_names:
            limit, rule = 0, "an evaluation or calibration needs all of them"
        else:
            limit = recipe.max_bad_images
            rule = f"training may leave out {limit} (train.max_bad_images, yaml: "
            rule += "DATALOADER.MAX_BAD_IMAGES)"
        _refuse(name, errors, findings.bad_images, limit, rule)


def _refuse(
    name: str, errors: list[Finding], bad_images: list[Finding], limit: int, rule: str
) -> None:
    """
    Args:
        limit: how many of the bad images do not matter, for which `rule` is the reason.
    """
    by_settings = [f for f in errors if f.kind in BY_SETTINGS]
    if by_settings:
        raise UserError(
            f"Dataset '{name}' has {plural(len(by_settings), 'image')} that cannot be used as the "
            f"config is, such as {by_settings[0]} ({by_settings[0].kind})."
        )
    metadata = MetadataCatalog.get(name)
    paths = shlex.join([metadata.json_file, metadata.get("image_root") or "IMAGES"])
    advice = (
        f"`msrcnn-d2 check-data {paths}` shows all of them, and with --fix OUT.json fixes or "
        "leaves out what it can"
    )
    if errors:
        raise UserError(
            f"Dataset '{name}' has {plural(len(errors), 'error')}, such as {errors[0]} "
            f"({errors[0].kind}): {advice}."
        )
    if len(bad_images) > limit:
        raise UserError(
            f"Dataset '{name}' has {plural(len(bad_images), 'image')} that cannot be used, such as "
            f"{bad_images[0]} ({bad_images[0].kind}), and {rule}: {advice}."
        )


def _check_that_there_are_objects(title: str, findings: Findings, training: bool) -> None:
    """
    A test set without objects makes all results NaN. That stops an evaluation and is a warning
    before a training. A file that has no list of annotations is meant for prediction only.
    """
    reasons = [f.message for f in findings.all if f.kind == "no-objects"]
    findings.all = [f for f in findings.all if f.kind != "no-objects"]
    if not (reasons and findings.has_annotations):
        return
    message = f"All results on {title} would be nan: {reasons[0]}"
    if not training:
        raise UserError(
            f"{message}. Correct the annotations; to predict only, give a file without "
            '"annotations".'
        )
    logger.warning("%s.", message)


def _log(name: str, findings: Findings, limit: int | None) -> None:
    """
    Args:
        limit: detections per image of the model; None for no limit.
    """
    bad = findings.of(Level.ERROR) + findings.of(Level.WARNING)
    text = f"\n{findings.summary(NUM_SHOWN)}" if bad else ""
    level = logging.WARNING if bad else logging.INFO
    logger.log(level, "Dataset '%s' has %s.%s", name, findings.totals(), text)
    if limit is None:
        return
    crowded = {image: n for image, n in findings.objects_per_image.items() if n > limit}
    if crowded:
        image, most = max(crowded.items(), key=lambda item: item[1])
        logger.warning(
            "Dataset '%s' has %s with more objects than the %d that the model detects in an image, "
            "such as image %r with %d: the rest cannot be found. Set model.roi_heads.box_predictor."
            "test_topk_per_image=%d (yaml: TEST.DETECTIONS_PER_IMAGE %d).",
            *(name, plural(len(crowded), "image"), limit, image, most, most, most),
        )


# ---- names of classes


def names_of_training(recipe: Recipe) -> list[str] | None:
    """Names of the classes that the model learns; None if the training data do not have them."""
    return names_of_dataset(recipe.train_names[0]) if recipe.train_names else None


def names_of_dataset(dataset: str) -> list[str] | None:
    """Names of the classes of a registered dataset, which is read if need be; None without any."""
    metadata = MetadataCatalog.get(dataset)
    if not hasattr(metadata, "thing_classes") and dataset in DatasetCatalog.list():
        DatasetCatalog.get(dataset)  # the json has the categories
    return list(metadata.get("thing_classes") or []) or None


def check_names_of_datasets(recipe: Recipe, training: bool) -> None:
    """
    Training sets and those of the validation loss need the same names in the same order. Test sets
    are evaluated by name: they may lack some of the names, or have more.

    Raises:
        UserError: a dataset does not match the first one.
    """
    train_names = [*recipe.train_names, *_validation_names(recipe)] if training else []
    test_names = [name for test_set in recipe.test_sets for name in test_set.names]
    first: tuple[str, list[str]] | None = None
    for dataset in dict.fromkeys([*train_names, *test_names]):
        names = names_of_dataset(dataset)
        if names is None:
            continue
        if first is None:
            first = f"dataset '{dataset}'", names
            continue
        compare = difference if dataset in train_names else obstacle
        why_not = compare(*first, f"dataset '{dataset}'", names)
        # In an evaluation, test sets may have nothing to do with each other
        if why_not and (training or sorted(names) == sorted(first[1])):
            raise UserError(f"{why_not} {ADVICE}")


def check_number(dataset: str, names: Sequence[str], num_classes: int) -> None:
    """
    Raises:
        UserError: a dataset and the model have different numbers of classes.
    """
    if len(names) != num_classes:
        raise UserError(
            f"Dataset '{dataset}' has {len(names)} categories ({listed(names)}), but the "
            f"model predicts {num_classes}: set model.roi_heads.num_classes={len(names)} "
            f"(yaml: MODEL.ROI_HEADS.NUM_CLASSES {len(names)})."
        )


def check_names_of_weights(
    found: Sequence[str] | None, expected: Sequence[str] | None, keeps_classes: bool
) -> None:
    """
    Args:
        found: class names in the weights that a training starts from, if they have any.
        expected: class names of the training data.
        keeps_classes: whether the class scores stay those of the weights, because the training
            resumes or because they are frozen.

    Raises:
        UserError: the weights have other classes, or the same in another order.
    """
    if found is None or expected is None or same(found, expected):
        return
    if keeps_classes or sorted(found) == sorted(expected):
        why_not = difference("the weights", found, "the training data", expected)
        raise UserError(
            f"{why_not} Train on the names and the order of the weights, or start from others."
        )
    if len(found) == len(expected):
        logger.warning(
            "The weights were trained for other classes (%s): the class scores of %s start from "
            "theirs.",
            *(listed(found), listed(expected)),
        )
