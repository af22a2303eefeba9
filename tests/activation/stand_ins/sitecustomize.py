"""Stand-ins for megatron-core and its bridge: enough to import Megatron-SWIFT's options and pipeline, quickly."""

import importlib.machinery
import importlib.util
import sys
import types


class StandIn(types.ModuleType):
    __path__ = []
    __version__ = '0.16.1'

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        if name[0].isupper():
            value = type(name, (), {'__module__': self.__name__, '__init__': lambda self, *args, **kwargs: None})
        else:
            value = StandIn(f'{self.__name__}.{name}')
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        return None


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split('.')[0] in ('megatron', 'mcore_bridge', 'transformer_engine'):
            return importlib.machinery.ModuleSpec(name, Finder, is_package=True)

    @staticmethod
    def create_module(spec):
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module):
        pass


sys.meta_path.insert(0, Finder)  # before the real ones, where they are installed
