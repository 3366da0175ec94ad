"""Show one row of a data set as the model sees it in `train`, with the learned tokens marked.

    minimax-m3 show chats.jsonl --model CHECKPOINT --row 7
    minimax-m3 show chats.jsonl --model CHECKPOINT --row 7 --html row.html

The page holds the row's images and some frames of its videos.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from processing_minimax_m3.data import RowFault, Rows
from processing_minimax_m3.data.encoded_rows import encode_rows
from processing_minimax_m3.data.showing import show_page, show_text

from .data_options import add_data_options, open_data, output_file


def find_row(rows: Rows, number: int | None) -> int:
    """The index of the row that has this number in the first file, or of the first row.

    Raises:
        ValueError: There is no such row.
    """
    source = rows.sources[0]
    count = len(source)
    if count == 0:
        raise ValueError(f"{source.name} has no rows")
    if number is None:
        return 0
    for index in range(min(number, count)):
        if source.number(min(number, count) - 1 - index) == number:
            return min(number, count) - 1 - index
    raise ValueError(
        f"--row: {source.name} has no row {number}; its rows are {source.number(0)} to {source.number(count - 1)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "minimax-m3 show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_options(parser)
    parser.add_argument("--row", type=int, help="number of the row in the first file, as `check` names it (the first)")
    parser.add_argument("--html", type=output_file, help="write a page with the row and its pictures to this file")
    arguments = parser.parse_args(argv)
    try:
        rows, encoder, reading, processor = open_data(arguments)
        (result,) = encode_rows(rows.located([find_row(rows, arguments.row)]), encoder, reading)
        has_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(show_text(result, encoder.tokenizer, arguments.max_length, has_colour))
        if arguments.html is not None:
            arguments.html.write_text(show_page(result, processor, arguments.max_length), encoding="utf-8")
            print(f"\nwrote {arguments.html}")
    except (RowFault, ValueError, OSError) as error:
        sys.exit(f"show: {error}")


if __name__ == "__main__":
    main()
