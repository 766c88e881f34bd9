"""What would fail hours into a run is looked at before it starts."""

import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..checkpoint.checkpointer import numbered_checkpoints
from ..utils.errors import UserError
from .class_names import check_names_of_datasets, check_number
from .data_check import refuse_annotations
from .recipe import Recipe

__all__ = ["check_recipe", "keep_config_of_training", "refuse_other_run"]

# What Detectron2 registers when it is imported: below DETECTRON2_DATASETS
OF_DETECTRON2 = frozenset(DatasetCatalog.list())


def check_recipe(recipe: Recipe, num_processes: int, training: bool) -> None:
    """
    Check that datasets are there and fit the model, that the output folder can be written, that
    there is a compiler if one is needed, and that batches can be made.

    Args:
        num_processes: of all machines together.
        training: whether the run trains; if not, only what an evaluation needs is checked.

    Raises:
        UserError: the first of the above that fails, with what to do about it.
    """
    _check_output_dir(recipe.output_dir)
    _check_compiler(recipe)
    if not training and not recipe.test_sets:
        raise UserError(
            "There is nothing to evaluate on: the config has no dataloader.test and "
            "dataloader.evaluator (yaml: DATASETS.TEST)."
        )
    trained_on = list(recipe.train_names) if training else []
    for name in dict.fromkeys(trained_on + [n for t in recipe.test_sets for n in t.names]):
        # Of a test set it decides where there is no one to find classes by name
        names_matter = name in trained_on or (training and not trained_on)
        _check_dataset(name, recipe.num_classes if names_matter else None)
    check_names_of_datasets(recipe, training)
    for test_set in recipe.test_sets:
        _check_test_batch_size(test_set.batch_size)
    batch = recipe.total_batch_size
    if training and batch and batch % num_processes:
        raise UserError(
            f"A batch of {batch} images cannot be shared out to {num_processes} processes evenly: "
            "change dataloader.train.total_batch_size (yaml: SOLVER.IMS_PER_BATCH)."
        )


def _check_output_dir(path: str) -> None:
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
    A training from the start would mix its checkpoints and metrics with those of an earlier one.

    Raises:
        UserError: there are checkpoints of a training in the folder.
    """
    final = os.path.join(output_dir, "model_final.pth")
    found = [final] if os.path.exists(final) else []
    found += [path for _, path in numbered_checkpoints(output_dir)]
    if found:
        raise UserError(
            f"'{output_dir}' holds the checkpoints of another run "
            f"('{os.path.basename(found[0])}'): go on with it by --resume, or set "
            "train.output_dir (yaml: OUTPUT_DIR) to another folder."
        )


@contextmanager
def keep_config_of_training(output_dir: str) -> Iterator[None]:
    """
    Detectron2's `default_setup` writes the config of an evaluation over that of the training. In
    this context it is written into the folder of the evaluation's results, `inference`.
    """
    written = os.path.join(output_dir, "config.yaml")
    aside = os.path.join(output_dir, "config_of_training.yaml")
    if not comm.is_main_process():
        yield
        return
    if os.path.exists(written):
        shutil.copyfile(written, aside)  # not moved: it may be the config of the evaluation too
    try:
        yield
        if os.path.exists(written):
            os.makedirs(os.path.join(output_dir, "inference"), exist_ok=True)
            os.replace(written, os.path.join(output_dir, "inference", "config.yaml"))
    finally:
        if os.path.exists(aside):
            os.replace(aside, written)


def _check_compiler(recipe: Recipe) -> None:
    """For a CPU, torch.compile calls $CXX or g++; for a GPU it brings what it needs."""
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    if recipe.compile and recipe.device == "cpu" and not shutil.which(compiler):
        raise UserError(
            f"train.compile (yaml: SOLVER.COMPILE) needs a C++ compiler, but there is no "
            f"'{compiler}': install it, set CXX to another one, or leave train.compile at False."
        )


def _check_test_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise UserError(
            f"The batch size for evaluation is {batch_size}, not a whole number from 1 on: "
            "change dataloader.test.batch_size (yaml: DATALOADER.TEST_BATCH_SIZE)."
        )


def _check_dataset(name: str, num_classes: int | None) -> None:
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
        _read_dataset(name, metadata)  # the json has the categories
    if num_classes is not None:
        check_number(name, metadata.get("thing_classes") or [], num_classes)


def _read_dataset(name: str, metadata) -> None:
    try:
        DatasetCatalog.get(name)
    except Exception as error:  # a file that is of no use makes Detectron2 raise anything
        file = metadata.get("json_file")
        if file:
            refuse_annotations(name, file, metadata.get("image_root"))
        raise UserError(
            f"Dataset '{name}' cannot be read from '{file}' ({type(error).__name__}: {error}); it "
            "has to be in COCO's format."
        ) from error


def _check_paths(name: str, metadata) -> None:
    if name in OF_DETECTRON2:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        advice = (
            f"Set DETECTRON2_DATASETS (now '{root}') to the folder that contains coco/, or "
            "register your own data with --dataset."
        )
    else:
        advice = "Correct the path, such as the one given with --dataset."
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file and not PathManager.isfile(json_file):
        raise UserError(f"Annotations of dataset '{name}' are not at '{json_file}'. {advice}")
    if image_root and not (PathManager.isdir(image_root) and PathManager.ls(image_root)):
        raise UserError(f"Images of dataset '{name}' are not in '{image_root}'. {advice}")
