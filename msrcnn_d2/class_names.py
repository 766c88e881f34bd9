"""Names of classes: whether those of datasets and of weights go together, and how to say it."""

from collections.abc import Sequence

__all__ = ["difference", "match", "obstacle", "same", "shown_names"]

NUM_SHOWN = 5


def same(names: Sequence[str], others: Sequence[str]) -> bool:
    """
    Whether the names are the same in the same order, however they are spelled. Where spelling tells
    classes apart, as letters "a" and "A", it has to be the same.
    """
    plain = [*map(_plain, names)]
    if len(set(plain)) < len(plain):
        return list(names) == list(others)
    return plain == [*map(_plain, others)]


def match(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """For each of the names its position among the others, or None."""
    positions = {name: k for k, name in enumerate(others)}
    return [positions.get(name) for name in names]


def obstacle(first: str, names: Sequence[str], second: str, others: Sequence[str]) -> str:
    """
    Args:
        first, second: whose the names are, such as "dataset 'train'".
        names, others: of classes, in their order.

    Returns:
        why the classes of one cannot be found in the other by name, in a sentence; or "".
    """
    if same(names, others):
        return ""
    why = _why_not_by_name(list(names), list(others))
    return _sentence(first, list(names), second, list(others), why) if why else ""


def _why_not_by_name(names: list[str], others: list[str]) -> str:
    alike = _spelled_differently(names, others)
    if sorted(names) == sorted(others):
        return "the names are the same, but in another order"
    if alike:
        return f"'{alike[0]}' and '{alike[1]}' are probably meant to be the same"
    if len(set(names)) < len(names) or len(set(others)) < len(others):
        return "a name occurs twice in one of them"
    if not set(names).intersection(others):
        return "they have no name in common"
    return ""


def difference(first: str, names: Sequence[str], second: str, others: Sequence[str]) -> str:
    """As :func:`obstacle`, where the names have to be the same in the same order."""
    names, others = list(names), list(others)
    if names == others:
        return ""
    why = _why_not_by_name(names, others) or "the names have to be the same"
    return _sentence(first, names, second, others, why)


def shown_names(names: Sequence[str], first: int = 0) -> str:
    """The names from one position on, shortened."""
    shown = ", ".join(names[first : first + NUM_SHOWN])
    return f"{'..., ' if first else ''}{shown}{', ...' if first + NUM_SHOWN < len(names) else ''}"


def _sentence(first: str, names: list[str], second: str, others: list[str], why: str) -> str:
    pairs = enumerate(zip(names, others))
    place = next((k for k, (a, b) in pairs if a != b), min(len(names), len(others)))
    start = max(0, place - 1)
    return (
        f"The classes of {first} and {second} do not go together, from number {place + 1} on: "
        f"{first} has {len(names)} ({shown_names(names, start)}), {second} has {len(others)} "
        f"({shown_names(others, start)}); {why}."
    )


def _spelled_differently(names: list[str], others: list[str]) -> tuple[str, str] | None:
    """Two names that differ in capitals, blanks, hyphens or underscores only."""
    known = {_plain(name): name for name in others if name not in names}
    for name in names:
        if name not in others and _plain(name) in known:
            return name, known[_plain(name)]
    return None


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if not c.isspace() and c not in "-_")
