"""
Run a step of a training again whose loss was not finite.

`train_net.py` has written it, with the weights, the images and the seed of the step.
"""

import argparse
import os
import sys
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from ..checkpoint import MaskScoringCheckpointer
from ..utils.errors import UserError, exit_on_user_error
from ..utils.text import listed
from .configs import find_config_file, load_config
from .plain_batch import from_plain
from .recipe import build_recipe
from .trainer import adapt_forward, is_finite, nonfinite_gradients

__all__ = ["replay"]

EXAMPLES = """
examples:
  what went wrong, and where first:
    python -m msrcnn_d2.engine.replay output/nonfinite/step_0000123.pth
  with another config:
    python -m msrcnn_d2.engine.replay step_0000123.pth --config-file my_config.py train.device=cpu
"""


def replay(path: str, config_file: str, overrides: list[str] | None = None) -> list[dict]:
    """
    Args:
        path: of a file in "nonfinite/" of an output folder.
        config_file: of the training.
        overrides: as :func:`load_config` takes them.

    Returns:
        for each process that took part in the step its "images" (their ids), "losses" ({name:
        number}), "gradients" (names of parameters whose gradient is not finite) and "first" (the
        name of the first module whose output is not finite, None if all are).

    Raises:
        UserError: a file cannot be read, or the step is of another model.
    """
    recipe = build_recipe(load_config(config_file, overrides or []))
    model = recipe.build_model().to(recipe.device).train()
    adapt_forward(model)
    # Statistics of batch norm may be infinite already
    step = MaskScoringCheckpointer(model).load(path, strict=True, finite=False)
    if "batches" not in step:
        raise UserError(
            f"'{path}' is no step of a training: give a file in nonfinite/ of an output folder."
        )
    with EventStorage(step["iteration"]):
        return [_run(model, batch, recipe) for batch in step["batches"]]


def _run(model: nn.Module, batch: dict[str, Any], recipe) -> dict:
    inputs = from_plain(batch["inputs"])
    model.zero_grad()
    seed_all_rng(batch["seed"])
    device = recipe.device.split(":")[0]
    watch = _FirstNonFinite(model)
    amp_type = torch.float16 if device == "cuda" else torch.bfloat16  # those of training
    with watch, torch.autocast(device, dtype=amp_type, enabled=recipe.amp):
        losses = model(inputs)
    sum(losses.values()).backward()
    return {
        "images": [x.get("image_id", x.get("file_name")) for x in inputs],
        "losses": {name: loss.item() for name, loss in losses.items()},
        "gradients": nonfinite_gradients(model),
        "first": watch.name,
    }


class _FirstNonFinite:
    """Inside of its block, `name` becomes that of the first module with such an output."""

    def __init__(self, model: nn.Module):
        self.name: str | None = None
        self._model = model

    def __enter__(self):
        self._hooks = [
            module.register_forward_hook(self._look(name))
            for name, module in self._model.named_modules()
            if name
        ]
        return self

    def _look(self, name: str):
        def hook(module, inputs, output):
            if self.name is None and not all(map(is_finite, _tensors(output))):
                self.name = name

        return hook

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for x in output for t in _tensors(x)] if isinstance(output, (list, tuple)) else []


def table(results: list[dict]) -> str:
    """Text with a part for each process."""
    parts = []
    for process, result in enumerate(results):
        rows = tabulate(result["losses"].items(), headers=("loss", ""), tablefmt="github")
        parts.append(
            f"Process {process}, images {', '.join(map(str, result['images']))}\n{rows}\n"
            f"first module whose output is not finite: {result['first'] or 'none'}\n"
            f"gradients that are not finite: {listed(result['gradients']) or 'none'}"
        )
    return "\n\n".join(parts)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m msrcnn_d2.engine.replay",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", help="file in nonfinite/ of the output folder")
    parser.add_argument(
        "--config-file", help="of the training; by default the config.yaml of its output folder"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as of train_net.py")
    return parser


def main(args: argparse.Namespace) -> None:
    with exit_on_user_error():
        setup_logger(name="msrcnn_d2")
        output_dir = os.path.dirname(os.path.dirname(os.path.abspath(args.step)))
        config_file = find_config_file(args.config_file or os.path.join(output_dir, "config.yaml"))
        print(table(replay(args.step, config_file, args.overrides)))


if __name__ == "__main__":
    main(argument_parser().parse_args(sys.argv[1:]))
