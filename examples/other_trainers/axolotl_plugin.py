"""Makes axolotl load MiniMax-M3 with the classes of this project.

Put this folder on `PYTHONPATH` and name the plugin in the config. `docs/other_trainers.md` has a complete one.

    plugins:
      - axolotl_plugin.MiniMaxM3Plugin
"""

from axolotl.integrations.base import BasePlugin

import modeling_minimax_m3  # noqa: F401 - registers the classes


class MiniMaxM3Plugin(BasePlugin):
    """Does nothing more: importing this file has registered the classes."""
