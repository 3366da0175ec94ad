"""`register_for_auto_class` for classes of an installed package.

Transformers copies the file of a registered class into the checkpoint, and the other files of its folder. Our classes
stand in several folders, and Python would take a copied class for a different class than the package's own. So the
checkpoint gets one file that imports all classes from the installed package. `trust_remote_code=True` reads that file.
"""

import os
from pathlib import Path
from typing import Any, ClassVar

MODULE = "minimax_m3_classes"
SOURCE = '''"""The classes of MiniMax-M3 that this folder names in `auto_map`. They come from an installed package."""

try:
    from configuration_minimax_m3 import *
    from modeling_minimax_m3 import *
    from processing_minimax_m3 import *
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error}. The classes that this checkpoint names are those of the package minimax-m3-transformers, which has "
        "to be installed. Without `trust_remote_code=True`, those of Transformers are taken."
    ) from error
'''


class AutoClassByImport:
    """A mixin that stands before the base class of Transformers.

    Subclasses in other packages are saved as Transformers saves them.
    """

    _auto_class: ClassVar[str | None]  # Transformers' attribute: the Auto class for which a class is registered
    _auto_class_by_import: ClassVar[str | None]

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Registers this class for an Auto class, as in Transformers.

        A checkpoint that `save_pretrained` writes later loads as this class with `trust_remote_code=True`, if this
        package is installed.
        """
        super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]  # of the base class of Transformers
        if _is_importable(cls):
            cls._auto_class_by_import, cls._auto_class = cls._auto_class, None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Saves as Transformers does."""
        for part in [self, *(getattr(self, name) for name in getattr(self, "get_attributes", list)())]:
            if isinstance(part, AutoClassByImport):
                part._name_auto_class(Path(save_directory))
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # likewise

    def _name_auto_class(self, folder: Path) -> None:
        auto_class = vars(type(self)).get("_auto_class_by_import")
        if auto_class is None:
            return
        config: Any = getattr(self, "config", self)  # a processor has no config and names its own class
        names = {auto_class: f"{MODULE}.{type(self).__name__}"}
        if config is not self:  # the model cannot be made from Transformers' config
            names["AutoConfig"] = f"{MODULE}.{type(config).__name__}"
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), **names}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{MODULE}.py").write_text(SOURCE)


def _is_importable(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in (
        "configuration_minimax_m3",
        "modeling_minimax_m3",
        "processing_minimax_m3",
    )
