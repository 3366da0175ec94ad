"""MINIMAX_M3_MSA_LOG=1: one line per form of call, which says the backend that runs it and why.

Lines go to the logger of this package at level INFO. Where the application has set up no logging, they go to stderr.
"""

import logging
import os

_logger = logging.getLogger(__package__)
_logged: set[str] = set()


def is_on() -> bool:
    """Whether calls are logged."""
    return os.environ.get("MINIMAX_M3_MSA_LOG") == "1"


def log_once(line: str) -> None:
    """Logs `line` unless this process has logged the same line before."""
    if line in _logged:
        return
    _logged.add(line)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.info(line)
