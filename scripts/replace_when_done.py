"""Writes files and folders completely or not at all: first beside their place, then by a rename."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_when_done(target: str | Path) -> Iterator[Path]:
    """Yields a path to write to. It becomes `target` if the block ends without an error.

    Until then `target` stays as it was, absent or with its earlier content. After an error nothing of the new content
    remains. The path ends in the name of `target` and lies in a hidden folder beside it.

    Args:
        target (str or Path): The file or folder to write. Missing folders above it are made. An earlier file is
            replaced. An earlier folder is replaced if the new folder has all of its files.

    Raises:
        FileExistsError: `target` is a folder with other files, which would be lost.
        OSError: `target` is a mount point, which cannot be renamed.
    """
    target = Path(target).resolve()  # a link stays a link
    if os.path.ismount(target):
        raise OSError(f"{target} is a mount point, which cannot be replaced. Name a folder inside it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    unfinished = workspace / target.name
    try:
        yield unfinished
        if target.is_dir() and unfinished.is_dir():
            files = [file.relative_to(target) for file in target.rglob("*")]
            lost = sorted(str(file) for file in files if not (unfinished / file).exists())
            if lost:
                raise FileExistsError(
                    f"{target} holds {', '.join(lost)}, which would be lost. Remove it, or name another folder."
                )
            target.rename(workspace / "earlier")  # a folder cannot take the place of one that holds files
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(workspace)
