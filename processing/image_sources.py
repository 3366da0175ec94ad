"""Opens the source of an image: a path, an address, base64 text or the bytes of a file."""

import base64
import binascii
import io
import os
import re
import string
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from .downloads import download, is_address
from .media_limits import get_media_limits

BASE64_CHARACTERS = frozenset(string.ascii_letters + string.digits + "+/=-_")
LONGEST_PATH = 4096  # characters, on Linux


def open_image_source(source: str | bytes) -> BinaryIO:
    """Opens a path, an http(s) address, a data URL, base64 text or the bytes of an image file for reading.

    A string counts as a path if such a file exists, or if it has characters that base64 does not have.

    Raises:
        ValueError: There is nothing to open, or the `MediaLimits` in force forbid it. The message says how the source
            was interpreted, and does not repeat it.
    """
    file: BinaryIO
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif is_address(source):
        file = io.BytesIO()
        download(source, file)
        file.seek(0)
    elif is_path_or_base64(source):
        file = _open_path_or_base64(source)
    else:
        file = io.BytesIO(_read_data_url(source))
    if not file.read(1):
        file.close()
        raise ValueError("it is empty: 0 bytes.")
    file.seek(0)
    return file


def is_path_or_base64(source: str | bytes) -> bool:
    """Whether this is a string that is neither an address nor a data URL."""
    return isinstance(source, str) and not is_address(source) and source[:5].lower() != "data:"


def _read_data_url(source: str) -> bytes:
    head, comma, data = source.partition(",")
    if not comma:
        raise ValueError("a data URL must have a comma before its data.")
    content = unquote_to_bytes(data)
    return _decode_base64(content.decode("ascii", "replace")) if head.lower().endswith(";base64") else content


def _decode_base64(text: str) -> bytes:
    """Decodes base64 text of either alphabet, with or without line breaks."""
    try:
        return base64.b64decode("".join(text.split()).translate(str.maketrans("-_", "+/")), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"it is no valid base64 text: {error}.") from error


def _open_path_or_base64(source: str) -> BinaryIO:
    if not source.strip():
        raise ValueError("an empty string is neither a path nor an address nor base64 text.")
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise ValueError(
            f"{scheme[0]!r} is not supported: give a path, an http://, https:// or file:// address, a data URL, "
            "base64 text or the bytes of the file."
        )
    files_are_allowed = get_media_limits().allow_files
    if files_are_allowed and os.path.isfile(source):
        return open(source, "rb")
    missing = "there is no such file" if files_are_allowed else "`MediaLimits.allow_files` is False"
    if len(source) <= LONGEST_PATH:
        if files_are_allowed and os.path.exists(source):
            kind = "a folder" if os.path.isdir(source) else "a special file"
            raise ValueError(f"this path is {kind}; give the path of an image file.")
        if not BASE64_CHARACTERS.issuperset("".join(source.split())):
            hint = " (`~` is not expanded)" if source.startswith("~") else ""
            raise ValueError(f"{missing}{hint}.")
    try:
        return io.BytesIO(_decode_base64(source))
    except ValueError as error:
        raise ValueError(f"{missing}, and {error}" if len(source) <= LONGEST_PATH else str(error)) from error
