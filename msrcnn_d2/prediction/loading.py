"""From what a user calls a model to a predictor: a checkpoint, a name, or an exported file."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msrcnn_d2_runtime.text import listed

from .. import model_zoo
from ..engine import find_config_file, load_config
from ..published_models import PUBLISHED
from ..utils.errors import UserError
from .predictor import MaskScoringPredictor

if TYPE_CHECKING:
    from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor

__all__ = ["DEMO", "FoundModel", "demo_model", "find_model", "load_predictor"]

DEMO = "demo"  # the name of the demo's model
CONFIG_SUFFIXES = (".py", ".yaml", ".yml")
WEIGHTS_SUFFIXES = (".pth", ".pt", ".pkl", ".pyth", ".safetensors")
EXAMPLES = (
    "give a checkpoint (its config lies beside it), an exported .onnx file, or a name such as "
    "ms_rcnn_R_50_FPN_1x (`msrcnn-d2 zoo` lists them)"
)


def load_predictor(
    model: str | os.PathLike | None = None,
    *,
    config_file: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    opts: Sequence[str] = (),
    device: str | None = None,
    rank_by: str | None = None,
    score_threshold: float | str = 0.0,
    class_names: Sequence[str] | None = None,
    amp: bool = False,
    tta: bool = False,
) -> "MaskScoringPredictor | OnnxPredictor":
    """
    Load a model by its file or its name.

    A config can run code and a file of weights cannot, so a config is never taken out of a file of
    weights: it lies beside it, or is given.

    Args:
        model: one of

            - a checkpoint. Its config is the file of the same name with ".py" or ".yaml" beside it,
              or else "config.yaml" beside it, which training writes;
            - the output folder of a training or of a calibration, for its last checkpoint;
            - a model with published weights, such as "ms_rcnn_R_50_FPN_1x", or one of Detectron2's,
              such as "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x";
            - a config that names its weights;
            - an exported model, ".onnx";
            - "demo" for the small model of projects/shapes, which comes with this package.

        config_file: path or name of the config, in place of the one that `model` has.
        weights: in place of `model`, together with `config_file`.
        opts: overrides of the config, as on the command line.
        device, rank_by, score_threshold, class_names, amp, tta: as for
            :class:`MaskScoringPredictor`.

    Raises:
        UserError: a file or a name does not exist, it is unclear which one is meant, or the model
            cannot be used so, as for :class:`MaskScoringPredictor`.
    """
    if model is not None and os.fspath(model).endswith(".onnx"):
        given: dict[str, object] = {"config": config_file, "weights": weights}
        given |= {"overrides": opts, "names": class_names}
        given |= {"mixed precision": amp, "test-time augmentation": tta}
        for name, value in given.items():
            if value:
                raise UserError(f"'{model}' is an exported model, which takes no {name}.")
        if device not in (None, "cpu"):
            raise UserError(f"'{model}' is an exported model: it runs on the CPU, not '{device}'.")
        from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor

        return OnnxPredictor(os.fspath(model), rank_by=rank_by, score_threshold=score_threshold)
    found = find_model(model, config_file=config_file, weights=weights)
    cfg = load_config(found.config_file, opts, weights=found.weights)
    return MaskScoringPredictor(
        cfg,
        rank_by=rank_by,
        score_threshold=score_threshold,
        device=device,
        class_names=class_names,
        amp=amp,
        tta=tta,
    )


class FoundModel(NamedTuple):
    """
    Attributes:
        config_file: path of the config.
        weights: a file, a URL or a name of a model zoo; None for those that the config names.
    """

    config_file: str
    weights: str | None


def find_model(
    model: str | os.PathLike | None = None,
    *,
    config_file: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
) -> FoundModel:
    """
    Find the config and the weights that are meant, without reading them.

    Args, Raises: as for :func:`load_predictor`.
    """
    model, config_file, weights = (
        None if x is None else os.fspath(x) for x in (model, config_file, weights)
    )
    if model and weights:
        raise UserError(f"Give '{model}' or '{weights}' as the model's weights, not both.")
    if not (model or weights or config_file):
        raise UserError(f"Which model? As the model, {EXAMPLES}.")
    if config_file:
        weights = model or weights
    elif model:
        config_file, weights = _find(model)
    else:
        assert weights is not None
        config_file = _config_of(weights)
    return FoundModel(find_config_file(config_file), weights)


def demo_model() -> str:
    """The path of the demo's weights, which have their config beside them."""
    package = Path(__file__).resolve().parents[1]
    folders = package / "shapes", package.parent / "projects" / "shapes"  # in a wheel, in a clone
    folder = next(filter(Path.is_dir, folders))
    return str(folder / "ms_rcnn_shapes.safetensors")


def _find(model: str) -> tuple[str, str | None]:
    """
    Returns:
        the config and the weights that are meant by `model`; None for the weights that the config
        names.
    """
    if os.path.isdir(model):
        weights = _last_checkpoint(model)
        return _config_of(weights), weights
    if os.path.isfile(model):
        if model.endswith(CONFIG_SUFFIXES):
            return model, None
        return _config_of(model), model
    if model == DEMO:
        weights = demo_model()
        return _config_of(weights), weights
    if model.endswith(WEIGHTS_SUFFIXES):
        if "://" not in model:
            raise UserError(f"Model '{model}' does not exist: {EXAMPLES}.")
        return _config_of(model), model
    name = os.path.splitext(model)[0] if model.endswith(CONFIG_SUFFIXES) else model
    if "/" in model:  # of either zoo, with or without a suffix
        suffixes = [""] if name != model else CONFIG_SUFFIXES[:2]
        ours = [f"{model}{x}" for x in suffixes if f"{model}{x}" in model_zoo.config_names()]
        if ours:
            model_zoo.get_checkpoint_url(name)
        return (ours or [model if suffixes == [""] else f"{model}.yaml"])[0], name
    if name in PUBLISHED:
        (config, *_) = [x for x in model_zoo.config_names() if Path(x).stem == name]
        return config, name
    nearest = difflib.get_close_matches(name, [*PUBLISHED, DEMO], n=1)
    advice = f"did you mean {nearest[0]}? Or {EXAMPLES}" if nearest else EXAMPLES
    raise UserError(f"There is neither a file nor a model with the name '{model}': {advice}.")


def _last_checkpoint(folder: str) -> str:
    """The weights in the output folder of a training, or the only ones in another folder."""
    last = Path(folder, "last_checkpoint")
    if last.is_file():
        path = Path(folder, last.read_text().strip())
        if path.is_file():
            return str(path)
    found = sorted(str(x) for x in Path(folder).iterdir() if x.suffix in WEIGHTS_SUFFIXES)
    if len(found) != 1:
        which = f"has several files of weights ({listed(found)})" if found else "has no checkpoint"
        raise UserError(f"Folder '{folder}' {which}: give the path of a checkpoint as the model.")
    return found[0]


def _config_of(weights: str) -> str:
    """The config beside a file of weights."""
    where = "give one with --config-file (in Python: config_file)"
    if "://" in weights:
        raise UserError(f"'{weights}' has weights, but no config: {where}.")
    stem = os.path.splitext(weights)[0]
    # The file of its own name comes first: config.yaml may be that of other weights
    found = [f"{stem}{x}" for x in CONFIG_SUFFIXES if os.path.isfile(f"{stem}{x}")]
    if len(found) > 1:
        raise UserError(f"'{weights}' has several configs, {listed(found)}: {where}.")
    of_folder = os.path.join(os.path.dirname(weights), "config.yaml")
    if found or os.path.isfile(of_folder):
        return found[0] if found else of_folder
    raise UserError(
        f"'{weights}' has weights, but no config, and neither config.yaml nor "
        f"{os.path.basename(stem)}.yaml or .py lies beside it: {where}."
    )
