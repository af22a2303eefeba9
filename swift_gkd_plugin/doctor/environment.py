"""What is installed, whether it works, and who else hooks into ms-swift."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch

from ..activation import HOSTS, SWITCH
from ..versions import TRIED, __version__
from .findings import Findings

IMPORT_SECONDS = 120  # vLLM takes twenty on a busy machine

# What is optional: its distribution, the module that shows whether it works, and what for.
OPTIONAL = {
    'vllm': ('vllm', '--use_vllm and --gkd_teacher_engine vllm'),
    'deepspeed': ('deepspeed', '--deepspeed'),
    'megatron-core': ('megatron.core', '`megatron rlhf`'),
    'mcore-bridge': ('mcore_bridge', '`megatron rlhf`'),
    'transformer-engine': ('transformer_engine.pytorch', '`megatron rlhf`'),
    'ray': ('ray', '`megatron rlhf --use_ray`'),
    'flash-attn': ('flash_attn', '--attn_impl flash_attn and --padding_free'),
}

IMPORTS = {'mcore-bridge': ('megatron-core', 'transformer-engine')}  # what is tried with it

# Run as if it were the process of ms-swift's that trains: is the plugin in it, and who else?
ASK = """
import json, sys
ours = 'swift_gkd_plugin.activation' in sys.modules
usual = ('_frozen_importlib', '_frozen_importlib_external', '_distutils_hack', 'six', 'swift_gkd_plugin')
others = {type(f).__module__ if not isinstance(f, type) else f.__module__ for f in sys.meta_path}
started = [name for name in ('sitecustomize', 'usercustomize') if name in sys.modules]
print(json.dumps([ours, sorted(name for name in others if name.partition('.')[0] not in usual), started]))
"""


def examine(found: Findings, needed: Collection[str] | None) -> None:
    """
    Args:
        needed: Of :data:`OPTIONAL`, what a training command needs; None without one: then all that is installed is tried.
    """
    found.section = 'environment'
    _versions(found)
    _activation(found)
    _gpus(found)
    _compilers(found)
    _optional(found, needed)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions(found: Findings) -> None:
    from packaging.specifiers import SpecifierSet

    fits, python = [], platform.python_version()
    for name, tried in {'ms-swift': HOSTS, **TRIED}.items():
        there = installed(name)
        if there is None:
            continue
        if SpecifierSet(tried).contains(there, prereleases=True):
            fits.append(f'{name} {there}')
        elif name == 'ms-swift':
            found.error('versions', f'ms-swift {there} is not supported, only {tried} is.', f"Install one: pip install 'ms-swift{tried}'")
        else:
            found.warning('versions', f'{name} {there} was not tried, {tried} was.', f"If something fails: pip install '{name}{tried}'")
    found.ok('versions', f'swift-gkd-plugin {__version__}, Python {python}; as tried: {", ".join(fits)}.')


def _activation(found: Findings) -> None:
    if os.environ.get(SWITCH, '').lower() in ('0', 'false', 'no', 'off'):
        found.warning('activation', f'{SWITCH}={os.environ[SWITCH]}: ms-swift trains without the plugin.', f'Unset {SWITCH}.')
        return
    command = [sys.executable, '-c', ASK, 'swift.cli.rlhf', '--rlhf_type', 'gkd']
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ['no message'])[-1]
        found.error('activation', f'A gkd run would end at its start: {last}', 'Install the plugin again: pip install .')
        return
    ours, others, started = json.loads(asked.stdout.splitlines()[-1])
    if ours:
        found.ok('activation', '`swift rlhf --rlhf_type gkd` and `megatron rlhf --rlhf_type gkd` run the plugin.')
    else:
        found.error(
            'activation',
            'A gkd run would be that of stock ms-swift: swift_gkd_plugin.pth is not in a site-packages that Python reads.',
            'pip install the plugin in the environment that trains, and do not start Python with -S or -I.',
        )
    hooks = [*(f'an import hook of {name}' for name in others), *started]
    if hooks:
        found.note(
            'hooks',
            f'Others change what Python imports: {", ".join(hooks)}.',
            'If a run of ms-swift behaves strangely, start it without them once.',
        )


def _gpus(found: Findings) -> None:
    if not torch.cuda.is_available():
        if shutil.which('nvidia-smi') and os.environ.get('CUDA_VISIBLE_DEVICES') != '':
            built = torch.version.cuda or 'no CUDA'
            found.warning(
                'gpus',
                f'nvidia-smi is here, but torch {torch.__version__} (built for {built}) sees no GPU.',
                'Compare the driver (nvidia-smi) with the CUDA that torch was built for; install a torch for an older CUDA.',
            )
        else:
            found.note('gpus', 'There is no GPU here.', 'Of a command for another machine say what its cards have: --gpu-memory GIB.')
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        line = f'cuda:{number}, {torch.cuda.get_device_name(number)}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free.'
        if free < 0.9 * total:
            found.warning('gpus', line, 'Somebody else uses it (nvidia-smi); the memory plan counts with all of it.')
        else:
            found.ok('gpus', line)


def _compilers(found: Findings) -> None:
    c, cxx = (next(filter(shutil.which, filter(None, names)), None) for names in _compiler_names())
    header = os.path.join(sysconfig.get_paths()['include'], 'Python.h')
    missing = [*([] if c else ['a C compiler']), *([] if os.path.exists(header) else ['Python.h'])]
    gpu, triton = torch.cuda.is_available(), installed('triton')
    tell: Callable[..., None] = found.warning if gpu else found.note
    if triton is None:
        tell('triton', 'Triton is not installed: on a GPU the divergence is right without, but slower.', 'pip install triton')
    elif missing:
        tell(
            'triton',
            f'Triton {triton} has no {" and no ".join(missing)}, and cannot start its kernels.',
            'Install gcc and the headers of Python (apt install gcc python3-dev), or set CC.',
        )
    else:
        found.ok('triton', f'Triton {triton} has a C compiler ({c}) and Python.h.')
    if cxx is None:
        found.note('torch.compile', 'torch.compile has no C++ compiler: nothing is compiled on a CPU.', 'apt install g++, or set CXX.')
    else:
        found.ok('torch.compile', f'torch.compile has a C++ compiler ({cxx}).')


def _compiler_names() -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    return (os.environ.get('CC'), 'gcc', 'clang', 'cc'), (os.environ.get('CXX'), 'g++', 'clang++', 'c++')


def _optional(found: Findings, needed: Collection[str] | None) -> None:
    absent = [name for name, (module, _) in OPTIONAL.items() if not _is_there(module)]
    for name in absent:
        what = OPTIONAL[name][1]
        if needed and name in needed:
            found.error('packages', f'{name} is not installed, and {what} needs it.', f'pip install {name}')
    there = [name for name in OPTIONAL if name not in absent]
    unused = [name for name in absent if not needed or name not in needed]
    if unused and needed is None:
        found.note('packages', 'Not installed: ' + ', '.join(f'{name} (for {OPTIONAL[name][1]})' for name in unused) + '.')
    tried = [name for name in there if needed is None or name in needed]
    tried = [name for name in tried if not any(name in with_it for first, with_it in IMPORTS.items() if first in tried)]
    with ThreadPoolExecutor(2) as pool:
        for name, error in zip(tried, pool.map(_import_error, tried), strict=True):
            if error is None:
                found.ok('packages', f'{name} {installed(name) or "(version unknown)"} can be imported.')
            else:
                tell = found.error if needed else found.warning
                tell('packages', f'{name} {installed(name)} cannot be imported: {error}', f'Install what is missing, or uninstall {name}.')


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module.partition('.')[0]) is not None


def _import_error(name: str) -> str | None:
    """The last line of what Python says; None if it can be imported, in a process of its own."""
    try:
        done = subprocess.run([sys.executable, '-c', f'import {OPTIONAL[name][0]}'], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f'it takes more than {IMPORT_SECONDS} s'
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]
