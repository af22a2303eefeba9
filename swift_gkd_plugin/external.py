"""For those who don't install the plugin: ``swift rlhf --rlhf_type gkd --external_plugins <path of this file> …``.

ms-swift loads the file after it has parsed the command line, so the plugin's own options can't be given there. They go through
``--model_kwargs '{"gkd_loss_weight": 0.5}'``. Where the plugin is installed and active this file changes nothing.
"""

import importlib.util
import os
import sys

_package = os.path.dirname(os.path.abspath(__file__))
# ms-swift has put this directory in front of the path, where our megatron/ would hide megatron-core.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _package]
if importlib.util.find_spec('swift_gkd_plugin') is None:
    sys.path.append(os.path.dirname(_package))

from swift_gkd_plugin import register  # noqa: E402  needs the path

register()
