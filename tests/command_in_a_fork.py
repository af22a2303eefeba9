"""``command_in_a_fork.py SCRIPT ...``: what ``python SCRIPT ...`` does where the plugin is installed, in a process that has ms-swift in it.

At the start of such a Python the plugin's .pth looks at the command line and enters ``activate``; here that comes after the imports.
"""

import runpy
import sys
from pathlib import Path

from swift_gkd_plugin.activation import activate

sys.argv = sys.argv[1:]
sys.orig_argv = [sys.executable, *sys.argv]
sys.path[0] = str(Path(sys.argv[0]).parent)
activate()
runpy.run_path(sys.argv[0], run_name='__main__')
