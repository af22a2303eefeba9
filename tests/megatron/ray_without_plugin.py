"""Run at the start of every Python (``ALSO_AT_START``): workers of Ray find no plugin while the file ``$WITHOUT_PLUGIN`` is there."""

import os
import sys


class WithoutPlugin:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'swift_gkd_plugin' and os.path.exists(os.environ['WITHOUT_PLUGIN']):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return None


if any(word.endswith('default_worker.py') for word in sys.orig_argv):
    sys.meta_path.insert(0, WithoutPlugin)
