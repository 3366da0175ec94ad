"""Goes through rows, from what a file holds to the tokens of each row or its fault."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .encoding import Encoded, Encoder
from .faults import Fault, RowFault, as_fault
from .formats import Example, Reading, read_example
from .row_faults import further_faults
from .sources import LocatedRow

# The tokenizer reads so many rows in one call, in several threads.
ROWS_OF_A_CALL = 256


@dataclass
class EncodedRow:
    """A row with its tokens, or with its fault.

    Args:
        located (LocatedRow): The row and its place.
        example (Example, optional): What the row says, if it can be read.
        encoded (Encoded, optional): Its tokens. None for a row with a fault.
        fault (Fault, optional): The first fault of the row.
        further_faults (list of Fault): Its other faults, if they were looked for.
    """

    located: LocatedRow
    example: Example | None = None
    encoded: Encoded | None = None
    fault: Fault | None = None
    further_faults: list[Fault] = field(default_factory=list)

    def checked(self) -> tuple[Example, Encoded]:
        """The example and its tokens.

        Raises:
            RowFault: The row has a fault.
        """
        if self.fault is not None:
            raise RowFault(self.fault)
        assert self.example is not None
        assert self.encoded is not None
        return self.example, self.encoded


def encode_rows(
    rows: Iterable[LocatedRow], encoder: Encoder, reading: Reading, finds_all: bool = False
) -> Iterator[EncodedRow]:
    """Encodes rows in their order. A row with a fault ends nothing.

    Args:
        rows (iterable of LocatedRow): The rows.
        encoder (Encoder): The checkpoint's tokens.
        reading (Reading): How rows are read.
        finds_all (bool): Whether a row with a fault is searched for others. This reads it once more for each fault.
    """
    for chunk in _batched(rows):
        results = [_read(located, reading) for located in chunk]
        readable = [result for result in results if result.example is not None]
        examples = [result.example for result in readable if result.example is not None]
        for result, encoded in zip(readable, encoder(examples)):
            if isinstance(encoded, ValueError):
                result.fault = as_fault(encoded, result.located.file, result.located.number)
            else:
                result.encoded = encoded
        for result in results if finds_all else ():
            if result.fault is not None:
                result.further_faults = further_faults(result.fault, result.located, encoder, reading)
        yield from results


def _batched(rows: Iterable[LocatedRow]) -> Iterator[list[LocatedRow]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, ROWS_OF_A_CALL)):
        yield chunk


def _read(located: LocatedRow, reading: Reading) -> EncodedRow:
    if isinstance(located.row, RowFault):
        return EncodedRow(located, fault=located.row.fault)
    try:
        return EncodedRow(located, read_example(located.row, reading))
    except ValueError as error:
        return EncodedRow(located, fault=as_fault(error, located.file, located.number))
