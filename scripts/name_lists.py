"""Reads options that list names, such as `--parts answers,recall`."""

from collections.abc import Collection


def read_names(text: str, option: str, known: Collection[str]) -> list[str]:
    """The names of a list with commas.

    Args:
        text (str): The list.
        option (str): The option that messages name.
        known (collection of str): Names that may be in it.

    Raises:
        ValueError: A name is unknown, or stands there twice.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`{option}` must be names of {', '.join(known)}, got {unknown[0]!r}.")
    check_once(names, option)
    return names


def check_once(names: Collection[str], option: str) -> None:
    """Raises `ValueError` if a name stands in the list of an option twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"`{option}` must have each name once, got {name!r} twice.")
        seen.add(name)
