"""Choose installed fonts for names in any script."""

import functools
import logging
import unicodedata
from collections.abc import Iterable

from matplotlib import font_manager, rcParams
from matplotlib.ft2font import FT2Font

__all__ = ["drawable", "is_right_to_left", "left_to_right", "runs"]

logger = logging.getLogger(__name__)

LEFT_TO_RIGHT_MARK = "\u200e"
MISSING = "\N{WHITE SQUARE}"  # for characters that no font has
LAST_RESORT = "lastresort"  # a font of Matplotlib with a frame for each character, and no letters


def drawable(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """
    Args:
        texts: in any script.

    Returns:
        the texts, with a square for each character that no installed font has, and the font
        families to draw them with, Matplotlib's default first. A log message names the characters
        without a font, once.
    """
    texts = list(texts)
    default = list(rcParams["font.family"])
    usual = font_manager.findfont(font_manager.FontProperties(family=default))
    lacking = _visible("".join(texts)) - _characters_of(usual)
    if not lacking:
        return texts, default
    families = []
    for family, characters in _fallbacks("".join(sorted(lacking))):
        families.append(family)
        lacking -= characters
    if lacking:
        _say("".join(sorted(lacking)))
    return ["".join(MISSING if c in lacking else c for c in x) for x in texts], default + families


@functools.lru_cache(maxsize=1024)
def runs(text: str) -> list[tuple[str, str]]:
    """
    Args:
        text: in any script.

    Returns:
        the parts of the text, from left to right, and the font file to draw each with. Characters
        that no installed font has are replaced as by :func:`drawable`.
    """
    usual = font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))
    lacking = _visible(text) - _characters_of(usual)
    if not lacking:
        return [(text, usual)]
    files = dict(_installed())
    fallbacks = _fallbacks("".join(sorted(lacking)))
    if is_right_to_left(text):  # parts of a word would be in the wrong order
        fallbacks = fallbacks[:1]
    file_of = {c: files[family] for family, characters in fallbacks for c in characters}
    unknown = lacking - file_of.keys()
    if unknown:
        _say("".join(sorted(unknown)))
    parts: list[tuple[str, str]] = []
    for c in text:
        file, c = (usual, MISSING) if c in unknown else (file_of.get(c, usual), c)
        # Marks stay with their letter, and blanks between words: the words of a name from right to
        # left are in the right order only within a part
        joins = not _visible(c) or unicodedata.category(c).startswith("M")
        if parts and (joins or file == parts[-1][1]):
            parts[-1] = (parts[-1][0] + c, parts[-1][1])
        else:
            parts.append((c, file))
    return parts


def left_to_right(name: str) -> str:
    """The name with marks, so that an Arabic name, say, does not reverse numbers beside it."""
    if is_right_to_left(name):
        return f"{LEFT_TO_RIGHT_MARK}{name}{LEFT_TO_RIGHT_MARK}"
    return name


def is_right_to_left(text: str) -> bool:
    """Whether it has letters that are written from right to left."""
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


def _visible(text: str) -> set[str]:
    """The characters without controls, joiners and variation selectors."""
    kept = {c for c in text if not unicodedata.category(c).startswith(("Cc", "Cf", "Z"))}
    return {c for c in kept if not "\ufe00" <= c <= "\ufe0f"}


@functools.lru_cache(maxsize=16)
def _fallbacks(wanted: str) -> list[tuple[str, set[str]]]:
    """Font families and the characters that each adds; the first one adds most."""
    lacking = set(wanted)
    found = [(family, lacking & _characters_of(path)) for family, path in _installed()]
    chosen = []
    while lacking:
        family, added = max(
            ((family, characters & lacking) for family, characters in found),
            key=lambda x: len(x[1]),
            default=("", set()),
        )
        if not added:
            break
        chosen.append((family, added))
        lacking = lacking - added
    return chosen


def _installed() -> list[tuple[str, str]]:
    """
    Families with upright fonts of usual weight, and the file of each that Matplotlib draws with.
    Those of usual width come first, and of these the ones without serifs.
    """
    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in font_manager.findSystemFonts():  # Matplotlib's list may be older than a font
        if path not in known:
            try:
                manager.addfont(path)
            except Exception as error:  # Matplotlib cannot draw fonts of pictures, for example
                logger.debug("Font '%s' cannot be used: %s", path, error)
    usual = [
        entry
        for entry in manager.ttflist
        if entry.style == "normal" and entry.weight in (400, "normal", "regular", "book")
    ]
    usual = [x for x in usual if LAST_RESORT not in x.name.replace(" ", "").lower()]
    usual.sort(key=lambda x: (x.stretch != "normal", "sans" not in x.name.lower(), x.name))
    files: dict[str, str] = {}
    for entry in usual:  # as in Matplotlib, a condensed font counts only if there is no other
        files.setdefault(entry.name, entry.fname)
    return list(files.items())


@functools.cache
def _characters_of(path: str) -> frozenset[str]:
    try:
        font = FT2Font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except Exception as error:
        logger.debug("Font '%s' cannot be read: %s", path, error)
        return frozenset()


@functools.cache
def _say(characters: str) -> None:
    logger.warning(
        "No installed font has the characters '%s' of class names: figures show %s in their place, "
        "and the tables of a report have the names. Install a font that has them, such as Noto.",
        *(characters[:40], MISSING),
    )
