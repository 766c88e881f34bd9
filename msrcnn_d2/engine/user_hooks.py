"""
Hooks and writers of the user's own: the entries of `train.hooks` and `train.writers` (yaml:
`SOLVER.HOOKS` and `SOLVER.WRITERS`).

An entry is the dotted name of what to call, such as "my_module.MyWriter", or a mapping with that
name as `_target_` and its arguments, which is what `LazyCall(MyWriter)(...)` makes.
"""

import difflib
import inspect
import logging
import pydoc
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter
from detectron2.utils.registry import locate

from ..utils.errors import UserError
from .configs import both_keys, line_of_user
from .hooks import MetricsWriter
from .recipe import Recipe

__all__ = ["UserWriters", "build_hooks", "build_writers", "check_hooks_and_writers"]

logger = logging.getLogger(__name__)

Entry = str | Mapping[str, Any]


def check_hooks_and_writers(recipe: Recipe) -> None:
    """
    Check the names and arguments of all entries. Nothing is built, since that may open a
    connection.

    Raises:
        UserError: there is no such class or function, it takes other arguments, or it is a class
            of something else.
    """
    for key, base, entries in (
        ("train.hooks", HookBase, recipe.hooks),
        ("train.writers", EventWriter, recipe.writers),
    ):
        for entry in entries:
            target = _target_of(key, entry)
            if isinstance(target, type) and not issubclass(target, base):
                raise UserError(_wrong_kind(key, entry, base))
            arguments = [] if isinstance(entry, str) else [k for k in entry if k != "_target_"]
            try:
                signature = inspect.signature(target)
            except ValueError:  # some that are written in C have none
                continue
            try:
                signature.bind(**dict.fromkeys(arguments))
            except TypeError as error:
                raise UserError(
                    f"{both_keys(key)}: {_name_of(entry)}{signature} cannot be called with "
                    f"{', '.join(arguments) or 'no arguments'}: {error}."
                ) from error


def build_hooks(recipe: Recipe) -> list[HookBase]:
    """
    The hooks of `recipe.hooks`, in their order; for every process.

    Raises:
        UserError: one cannot be built, or is no hook.
    """
    return [_build("train.hooks", entry, HookBase) for entry in recipe.hooks]


def build_writers(recipe: Recipe) -> "UserWriters | None":
    """
    The hook that calls the writers of `recipe.writers`, in their order; for the main process. None
    without writers.

    Raises:
        UserError: one cannot be built, or is no writer. Those before it are closed.
    """
    writers: list[_GuardedWriter] = []
    for entry in recipe.writers:
        try:
            writer = _build("train.writers", entry, EventWriter)
        except UserError:
            for built in writers:
                built.close()
            raise
        writers.append(_GuardedWriter(writer, _name_of(entry)))
    return UserWriters(writers, recipe.log_period, recipe.eval_period) if writers else None


class UserWriters(MetricsWriter):
    """
    Calls the user's writers when :class:`MetricsWriter` calls Detectron2's.

    A writer that fails at its first metrics ends the training. One that fails later, such as when
    a server is down for a while, gets a warning, and is called again for the next metrics.
    """

    def after_train(self) -> None:
        # This also runs while an error ends the training, which an error in here would replace
        for writer in self._writers:
            writer.finish()


class _GuardedWriter(EventWriter):
    def __init__(self, writer: EventWriter, name: str):
        self._writer = writer
        self._name = name
        self._has_written = False
        self._is_failing = False

    def write(self) -> None:
        try:
            self._writer.write()
        except Exception as error:
            was_failing, self._is_failing = self._is_failing, True
            if not self._has_written:
                raise UserError(
                    f"The writer {self._name} (train.writers, yaml: SOLVER.WRITERS) cannot write "
                    f"metrics: {_reason(error)}. Correct it or remove it from the list."
                ) from error
            if not was_failing:
                logger.warning(
                    "The writer %s cannot write metrics: %s. The training continues and calls it "
                    "again for the next ones; metrics.json has all of them.",
                    *(self._name, _reason(error)),
                )
        else:
            if self._is_failing:
                logger.warning("The writer %s writes again.", self._name)
            self._has_written, self._is_failing = True, False

    def finish(self) -> None:
        """Write what is new, and close. Errors are logged."""
        if self._has_written or not self._is_failing:
            try:
                self._writer.write()
            except Exception as error:
                logger.warning(
                    "The writer %s cannot write the last metrics: %s. metrics.json has them.",
                    *(self._name, _reason(error)),
                )
        self.close()

    def close(self) -> None:
        try:
            self._writer.close()
        except Exception as error:
            logger.warning("The writer %s cannot be closed: %s.", self._name, _reason(error))


def _build(key: str, entry: Entry, base: type) -> Any:
    try:
        built = _target_of(key, entry)() if isinstance(entry, str) else instantiate(entry)
    except UserError:
        raise
    except Exception as error:  # of any type, since the code is the user's
        raise UserError(
            f"{both_keys(key)}: {_name_of(entry)} cannot be built: {_reason(error)}."
        ) from error
    if not isinstance(built, base):
        raise UserError(_wrong_kind(key, entry, base))
    return built


def _wrong_kind(key: str, entry: Entry, base: type) -> str:
    module = "detectron2.utils.events" if base is EventWriter else "detectron2.engine"
    return (
        f"{both_keys(key)}: {_name_of(entry)} makes no {base.__name__}: derive it from "
        f"{module}.{base.__name__}."
    )


def _name_of(entry: Entry) -> str:
    target = entry if isinstance(entry, str) else entry["_target_"]
    return target if isinstance(target, str) else getattr(target, "__qualname__", repr(target))


def _target_of(key: str, entry: Entry) -> Callable:
    """What an entry calls. Raises a UserError if it cannot be found."""
    target = entry if isinstance(entry, str) else entry["_target_"]
    if not isinstance(target, str):
        return target
    try:
        found = locate(target)
    except pydoc.ErrorDuringImport as error:  # in the module itself, or in what it imports
        raise UserError(
            f"{both_keys(key)}: '{target}' cannot be imported: {type(error.value).__name__}: "
            f"{error.value}."
        ) from error
    except Exception:
        found = None
    if callable(found):
        return found
    module_name, _, name = target.rpartition(".")
    module = pydoc.locate(module_name) if module_name else None
    if module is None:
        raise UserError(
            f"{both_keys(key)}: there is no module '{module_name}' for '{target}'. Correct the "
            "name, or add the folder of the module to the environment variable PYTHONPATH."
        )
    nearest = difflib.get_close_matches(name, dir(module), n=2)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "."
    raise UserError(f"{both_keys(key)}: '{module_name}' has no class '{name}'{hint}")


def _reason(error: Exception) -> str:
    """The first line of its message, and where it was raised; without a full stop."""
    message = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    text = message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
    line = line_of_user(error)
    return f"{text} ({line})" if line else text
