"""Look at datasets before a run: a bad file is named in seconds, not met after hours."""

import logging

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..data import Finding, Findings, Level, check_dataset
from ..data.findings import BAD_IMAGES, plural
from ..errors import UserError
from .recipe import Recipe

__all__ = ["check_data"]

logger = logging.getLogger(__name__)

NUM_SHOWN = 2  # examples of each kind
# A set to predict on only may have no annotations
ONLY_IN_TRAINING = ("no-objects",)


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
            _check(name, metadata, recipe, name in train_names, name in test_names)


def _check(name: str, metadata, recipe: Recipe, is_trained_on: bool, is_tested_on: bool) -> None:
    annotations = PathManager.get_local_path(metadata.json_file)
    images = PathManager.get_local_path(metadata.image_root) if recipe.check_images else None
    findings = check_dataset(annotations, images, quick=True, needs_annotations=is_trained_on)
    _log(name, findings)
    advice = (
        f"`python -m msrcnn_d2.data.check {metadata.json_file} {metadata.image_root}` shows all of "
        "them, and with --fix OUT.json writes annotations without them"
    )
    other = BAD_IMAGES if is_trained_on else (*BAD_IMAGES, *ONLY_IN_TRAINING)
    errors = [f for f in findings.of(Level.ERROR) if f.kind not in other]
    if errors:
        raise UserError(
            f"Dataset '{name}' has {plural(len(errors), 'error')}, such as {_named(errors[0])}: "
            f"{advice}."
        )
    bad_images = findings.bad_images
    limit = 0 if is_tested_on else recipe.max_bad_images
    if len(bad_images) > limit:
        raise UserError(
            f"Dataset '{name}' has {plural(len(bad_images), 'image')} that cannot be used, such as "
            f"{_named(bad_images[0])}, and {_limit(limit, is_tested_on)}: {advice}."
        )


def _log(name: str, findings: Findings) -> None:
    bad = findings.of(Level.ERROR) + findings.of(Level.WARNING)
    text = f"\n{findings.summary(NUM_SHOWN)}" if bad else ""
    logger.log(
        logging.WARNING if bad else logging.INFO,
        "Dataset '%s' has %s.%s",
        *(name, findings.totals(), text),
    )


def _named(finding: Finding) -> str:
    return f"{finding} ({finding.kind})"


def _limit(limit: int, is_tested_on: bool) -> str:
    if is_tested_on:
        return "an evaluation needs all of them"
    return f"training may leave out {limit} (train.max_bad_images, yaml: DATALOADER.MAX_BAD_IMAGES)"
