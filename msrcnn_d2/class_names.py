"""Whether the class names of datasets and of weights agree, and a message if they do not."""

from collections.abc import Sequence

__all__ = ["difference", "match", "obstacle", "same"]


def same(names: Sequence[str], others: Sequence[str]) -> bool:
    """
    Whether the names and their order are the same. Case, blanks, hyphens and underscores matter
    only if they tell classes apart, as with letters "a" and "A".
    """
    plain = [*map(_plain, names)]
    if len(set(plain)) < len(plain):
        return list(names) == list(others)
    return plain == [*map(_plain, others)]


def match(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """The position of each name among the others, or None."""
    positions = {name: k for k, name in enumerate(others)}
    return [positions.get(name) for name in names]


def obstacle(first: str, names: Sequence[str], second: str, others: Sequence[str]) -> str:
    """
    Args:
        first, second: what has the names, such as "dataset 'train'".
        names, others: of classes, in their order.

    Returns:
        a sentence that says why the classes of one cannot be found in the other by name; or "".
    """
    why = "" if same(names, others) else _why_not_by_name(names, others)
    return why and _sentence(first, names, second, others, why)


def difference(first: str, names: Sequence[str], second: str, others: Sequence[str]) -> str:
    """Like :func:`obstacle`, for a use that needs the same names in the same order."""
    if list(names) == list(others):
        return ""
    why = _why_not_by_name(names, others) or "the names have to be the same"
    return _sentence(first, names, second, others, why)


def _why_not_by_name(names: Sequence[str], others: Sequence[str]) -> str:
    if sorted(names) == sorted(others):
        return "the names are the same, but in another order"
    known = {_plain(name): name for name in others if name not in names}
    for name in names:
        if name not in others and _plain(name) in known:
            return f"'{name}' and '{known[_plain(name)]}' are probably meant to be the same"
    if len(set(names)) < len(names) or len(set(others)) < len(others):
        return "a name occurs twice in one of them"
    if not set(names).intersection(others):
        return "they have no name in common"
    return ""


def _sentence(
    first: str, names: Sequence[str], second: str, others: Sequence[str], why: str
) -> str:
    pairs = enumerate(zip(names, others))
    place = next((k for k, (a, b) in pairs if a != b), min(len(names), len(others)))
    start = max(0, place - 1)
    return (
        f"The classes of {first} and {second} differ from number {place + 1} on: {first} has "
        f"{len(names)} ({_excerpt(names, start)}), {second} has {len(others)} "
        f"({_excerpt(others, start)}); {why}."
    )


def _excerpt(names: Sequence[str], start: int) -> str:
    """Five names from one position on."""
    dots = "..."
    some = [*names[start : start + 5], *([dots] if start + 5 < len(names) else [])]
    return ", ".join([dots, *some] if start else some)


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if not c.isspace() and c not in "-_")
