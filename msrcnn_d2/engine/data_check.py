"""Look at datasets before a run: a bad file is named in seconds, not met after hours."""

import logging
import shlex

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..dataset_check import Finding, Findings, Level, check_dataset
from ..dataset_check.issues import BAD_IMAGES
from ..utils.errors import UserError
from ..utils.text import plural
from .recipe import Recipe

__all__ = ["check_data", "refuse_annotations"]

logger = logging.getLogger(__name__)

NUM_SHOWN = 2  # examples of each kind
# Kinds of errors that are none for training
ONLY_IN_EVALUATION = ("area", "polygon-points")
# What the config mends, not another file; the message says how
BY_SETTINGS = ("image-orientation", "image-pixels", "image-deep", "image-deep-color")
# A few wrong boxes are noise; more, and they have been written in another format
MOST_WRONG_BOXES = 0.01


def check_data(recipe: Recipe, training: bool) -> None:
    """
    Check the datasets of a run that are in COCO's format, on the main process; log what is found.

    Training goes on with up to `max_bad_images` images that cannot be used, an evaluation with
    none.

    Raises:
        UserError: training or evaluation would fail, or learn nonsense.
    """
    if not comm.is_main_process():
        return
    train_names = recipe.train_names if training else ()
    test_names = [name for test_set in recipe.test_sets for name in test_set.names]
    for name in dict.fromkeys([*train_names, *test_names]):
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") == "coco" and metadata.get("json_file"):
            logger.info("Checking dataset '%s' ...", name)
            is_trained_on, is_tested_on = name in train_names, name in test_names
            _check(name, metadata, recipe, is_trained_on, is_tested_on, training)


def _check(
    name: str, metadata, recipe: Recipe, is_trained_on: bool, is_tested_on: bool, training: bool
) -> None:
    json_file, image_root = metadata.json_file, metadata.get("image_root")
    looks_at_images = recipe.check_images and image_root
    findings = check_dataset(
        PathManager.get_local_path(json_file),
        PathManager.get_local_path(image_root) if looks_at_images else None,
        quick=True,
        needs_annotations=is_trained_on,
        settings=recipe.images,
    )
    if not is_tested_on:
        findings.all = [f for f in findings.all if f.kind not in ONLY_IN_EVALUATION]
    if not is_trained_on:
        _check_evaluation(name, findings, training)
    _log(name, findings)
    _warn_of_crowded(name, findings, recipe.detections_per_image)
    errors = [f for f in findings.of(Level.ERROR) if f.kind not in BAD_IMAGES]
    wrong_boxes = [f for f in errors if f.kind == "box-elsewhere"]
    share = len(wrong_boxes) / max(1, findings.num_annotations)
    if not is_trained_on or share <= MOST_WRONG_BOXES:
        errors = [f for f in errors if f.kind != "box-elsewhere"]
    by_settings = [f for f in errors if f.kind in BY_SETTINGS]
    if by_settings:
        raise UserError(
            f"Dataset '{name}' has {plural(len(by_settings), 'image')} that cannot be used as the "
            f"config is, such as {_named(by_settings[0])}."
        )
    advice = _advice(json_file, image_root)
    if errors:
        raise _error(name, errors, advice)
    bad_images = findings.bad_images
    limit = 0 if is_tested_on else recipe.max_bad_images
    if len(bad_images) > limit:
        raise UserError(
            f"Dataset '{name}' has {plural(len(bad_images), 'image')} that cannot be used, such as "
            f"{_named(bad_images[0])}, and {_limit(limit, is_tested_on)}: {advice}."
        )


def refuse_annotations(name: str, json_file: str, image_root: str | None) -> None:
    """
    Raises:
        UserError: the file cannot be read, or it has errors; it tells the first one.
    """
    findings = check_dataset(PathManager.get_local_path(json_file), None)
    errors = findings.of(Level.ERROR)
    if errors:
        raise _error(name, errors, _advice(json_file, image_root))


def _error(name: str, errors: list[Finding], advice: str) -> UserError:
    return UserError(
        f"Dataset '{name}' has {plural(len(errors), 'error')}, such as {_named(errors[0])}: "
        f"{advice}."
    )


def _advice(json_file: str, image_root: str | None) -> str:
    command = shlex.join(["msrcnn-d2", "check-data", json_file, image_root or "IMAGES"])
    return f"`{command}` shows all of them, and with --fix OUT.json mends or leaves out what it can"


def _check_evaluation(name: str, findings: Findings, training: bool) -> None:
    """
    Of a set that has nothing to find all results are nan. That stops an evaluation, and is a
    warning before a training. A file without a list of annotations is one to predict on.
    """
    reasons = [f.message for f in findings.all if f.kind == "no-objects"]
    findings.all = [f for f in findings.all if f.kind != "no-objects"]
    if not (reasons and findings.has_annotations):
        return
    message = f"All results on dataset '{name}' would be nan: {reasons[0]}"
    if not training:
        raise UserError(
            f"{message}. Correct the annotations; to predict only, give a file without "
            '"annotations".'
        )
    logger.warning("%s.", message)


def _log(name: str, findings: Findings) -> None:
    bad = findings.of(Level.ERROR) + findings.of(Level.WARNING)
    text = f"\n{findings.summary(NUM_SHOWN)}" if bad else ""
    level = logging.WARNING if bad else logging.INFO
    logger.log(level, "Dataset '%s' has %s.%s", name, findings.totals(), text)


def _warn_of_crowded(name: str, findings: Findings, limit: int | None) -> None:
    crowded = {
        k: n for k, n in findings.objects_per_image.items() if limit is not None and n > limit
    }
    if not crowded:
        return
    image, most = max(crowded.items(), key=lambda item: item[1])
    logger.warning(
        "Dataset '%s' has %s with more objects than the %d that the model detects in an image, "
        "such as image %r with %d: the rest cannot be found. Set model.roi_heads.box_predictor."
        "test_topk_per_image=%d (yaml: TEST.DETECTIONS_PER_IMAGE %d).",
        *(name, plural(len(crowded), "image"), limit, image, most, most, most),
    )


def _named(finding: Finding) -> str:
    return f"{finding} ({finding.kind})"


def _limit(limit: int, is_tested_on: bool) -> str:
    if is_tested_on:
        return "an evaluation needs all of them"
    return f"training may leave out {limit} (train.max_bad_images, yaml: DATALOADER.MAX_BAD_IMAGES)"
