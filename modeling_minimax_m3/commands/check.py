"""Read all rows of a data set for `train`, and report every fault with its file, row and field.

    minimax-m3 check chats.jsonl --model CHECKPOINT
    minimax-m3 check part-*.jsonl --model CHECKPOINT --decode_media --report report.json

It tells how many tokens, images and videos there are, how long rows are, what would be cut or left out, and how full
packs would be. Of images it reads the headers alone, unless --decode_media is given. The exit status is 1 if a row has a
fault.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from processing_minimax_m3.data import Rows
from processing_minimax_m3.data.checking import check_rows

from .data_options import add_data_options, open_reading, open_sources, output_file


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "minimax-m3 check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_options(parser)
    parser.add_argument("--decode_media", action="store_true", help="decode all images and videos, which finds damage")
    parser.add_argument("--streaming", action="store_true", help="read rows once and in order, without keeping them")
    parser.add_argument("--num_proc", type=int, help="processes (the number of cores, at most 16)")
    parser.add_argument("--max_faults", type=int, default=100, help="print at most this many faults (100)")
    parser.add_argument("--report", type=output_file, help="write all counts and all faults to this JSON file")
    arguments = parser.parse_args(argv)
    try:
        sources = open_sources(arguments, arguments.streaming)
        rows = sources if arguments.streaming else Rows(sources)
        encoder, reading, _ = open_reading(arguments, arguments.decode_media)
        report = check_rows(rows, encoder, reading, arguments.max_length, arguments.num_proc)
        if arguments.report is not None:
            arguments.report.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"check: {error}")
    for fault in report.faults[: arguments.max_faults]:
        print(fault)
    if (more := len(report.faults) - arguments.max_faults) > 0:
        print(f"... and {more:,} more; --max_faults prints more, --report writes all")
    print(report)
    sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    main()
