"""Finds the package indexes that the user has configured for uv or pip."""

import configparser
import os
import re
import sys
from pathlib import Path

from pypi_simple import PYPI_SIMPLE_ENDPOINT

# A build cannot tell whether uv or pip runs it, so the variables of both count.
MAIN_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
FURTHER_VARIABLES = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL")


def configured_indexes() -> list[str]:
    """URLs of package indexes in the order in which to ask them.

    The public index is asked only if no other replaces it.
    """
    main = _from_environment(MAIN_VARIABLES) or _from_pip_config("index-url")
    further = _from_environment(FURTHER_VARIABLES) or _from_pip_config("extra-index-url")
    return list(dict.fromkeys(main + further if main else [PYPI_SIMPLE_ENDPOINT, *further]))


def _from_environment(variables: tuple[str, ...]) -> list[str]:
    values = (os.environ.get(variable, "") for variable in variables)
    return [_as_url(word) for value in values for word in value.split()]


def _from_pip_config(option: str) -> list[str]:
    """The words of an option in pip's configuration files; later files override earlier ones."""
    config = configparser.RawConfigParser(strict=False)
    try:
        config.read(_pip_config_files(), encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return []
    value = config.get("global", option, fallback="")
    value = config.get("install", option, fallback=value)
    return [_as_url(word) for word in value.split()]


def _pip_config_files() -> list[Path]:
    """From those of the machine to those of the user, as `pip config debug` lists them."""
    if os.environ.get("PIP_CONFIG_FILE") == os.devnull:
        return []
    home, name = Path.home(), "pip.ini" if os.name == "nt" else "pip.conf"
    user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path("/etc/xdg/pip"), Path("/etc"), Path("/Library/Application Support/pip")]
    files += [home / ".pip", home / "Library/Application Support/pip", user / "pip"]
    files += [Path(os.environ.get("APPDATA") or home) / "pip", Path(sys.prefix)]
    explicit = os.environ.get("PIP_CONFIG_FILE")
    return [file / name for file in files] + ([Path(explicit)] if explicit else [])


def _as_url(index: str) -> str:
    """Turn `name=URL`, as uv allows, and a plain directory, as pip allows, into a URL."""
    index = re.sub(r"^[\w.-]+=", "", index)
    return index if "://" in index or index.startswith("file:") else Path(index).absolute().as_uri()
