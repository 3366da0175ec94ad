"""A fault of the data: in which file, row and field it is, what came and what was expected."""

import re
from dataclasses import asdict, dataclass
from typing import Any

# Errors of this package begin with the field that they are about: `messages[1]`: `content[0]`: `text` must be ...
FIELD = re.compile(r"`([\w.\[\]]+)`(: (?=`)| |: )")


@dataclass(frozen=True)
class Fault:
    """One fault of the data.

    Args:
        file (str): The file, or the name of the data set.
        row (int, optional): Number of the row, counted from 1 as editors count lines. In files of JSON lines it is the
            number of the line. None stands for the file itself.
        field (str): Path in the row, such as "messages[1].content[0].image", whose indices count from 0. An empty
            path stands for the whole row.
        problem (str): What came and what was expected.
    """

    file: str
    row: int | None
    field: str
    problem: str

    def __str__(self) -> str:
        place = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{place}: {f'`{self.field}`: ' if self.field else ''}{self.problem}"

    def as_dict(self) -> dict[str, Any]:
        """The fault for a JSON file."""
        return asdict(self)


class RowFault(ValueError):
    """An error with its `Fault`, whose text is the message."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault

    def __reduce__(self) -> tuple[type, tuple[Fault]]:
        return type(self), (self.fault,)


def split_field(message: str) -> tuple[str, str]:
    """Splits the message of an error into the field that it begins with, if it does, and the rest."""
    names, rest = [], message
    while match := FIELD.match(rest):
        names.append(match[1])
        rest = rest[match.end() :]
        if match[2] != ": " or not rest.startswith("`"):
            break
    return ".".join(names), rest


def as_fault(error: Exception, file: str, row: int | None) -> Fault:
    """Converts an error of one row."""
    if isinstance(error, RowFault):
        return error.fault
    field, problem = split_field(str(error))
    return Fault(file, row, field, problem)
