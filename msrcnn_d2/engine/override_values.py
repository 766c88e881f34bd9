"""The value of `key=value` from the command line, by the type that the key has in the config."""

import ast
import math
from typing import Any

from ..utils.errors import UserError

__all__ = ["AS_IT_IS", "value_of_text"]

# Keys that are paths, also where they have no value yet
PATHS = frozenset(
    {"output_dir", "init_checkpoint", "json_file", "image_root", "OUTPUT_DIR", "WEIGHTS"}
)
# The text is for the config's own grammar: Hydra's, or Python's literals for yacs
AS_IT_IS = object()


def value_of_text(key: str, text: str, current: Any) -> Any:
    """
    Args:
        current: the key's value so far, None if it has none.

    Returns:
        for a path or another string, `text` as it is, or what it has between quotes; for a number,
        a number; else `AS_IT_IS`.

    Raises:
        UserError: the key takes a number, or True or False, and `text` is something else.
    """
    is_path = key.rsplit(".", 1)[-1] in PATHS
    if is_path or isinstance(current, str):
        if text in ("null", "None") or (text[:1] in ("[", "{") and not is_path):
            return AS_IT_IS  # such as a list of datasets where there was one
        return _without_quotes(text)
    if isinstance(current, bool):
        return _boolean(key, text, current)
    if isinstance(current, (int, float)):
        return _number(key, text, current)
    return AS_IT_IS


def _without_quotes(text: str) -> str:
    """A shell removes its own quotes; Hydra's grammar and yacs wanted others inside of them."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text
        return value if isinstance(value, str) else text
    return text


def _boolean(key: str, text: str, current: bool) -> Any:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() in values:
        return values[text.lower()]
    if text.startswith("$") or text in ("null", "None"):
        return AS_IT_IS
    raise UserError(f"'{key}={text}': {key} takes True or False (now {current}).")


def _number(key: str, text: str, current: int | float) -> Any:
    try:
        value = int(text)
    except ValueError:
        pass
    else:
        return value if isinstance(current, int) else float(value)
    # Other forms: a list where there was one number, a reference, Hydra's functions
    if text[:1] in ("[", "{", "(", "$") or text in ("null", "None") or text.endswith(")"):
        return AS_IT_IS
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        advice = ""
        if text.count(",") == 1 and text.replace(",", "").lstrip("+-").isdigit():
            advice = f": for a fraction write '{key}={text.replace(',', '.')}'"
        raise UserError(f"'{key}={text}': {key} takes a number (now {current}){advice}.")
    if isinstance(current, int) and number.is_integer():
        raise UserError(f"'{key}={text}': {key} takes a whole number; write '{key}={int(number)}'.")
    return number  # not whole where one was: 0 may be the default of any number
