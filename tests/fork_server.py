"""``python fork_server.py MODULE ...``: imports modules once, and runs scripts in processes of their own that have them already.

A process that trains needs eight seconds for its imports and two more for each further rank; a fork of this one needs none. It reads
requests from its standard input, one JSON object a line, and answers each with two lines on its standard output: the process that runs the
script, and how that ended. For a script that stays, a server, it is only the first line. starts.py has the other end.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.metadata
import json
import logging
import os
import runpy
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


def wait_for(ranks: set[int]) -> int:
    """The exit status of the first rank, by process id, that fails; the others are ended then. 0 if none does."""
    failure = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failure:
            failure = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failure


def run_script(script: str, arguments: list[str]) -> int:
    """A file, or the name of a module as ``python -m`` takes it."""
    sys.argv = [script, *arguments]
    if script.endswith('.py'):
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name='__main__')
    else:
        sys.path[0] = os.getcwd()
        runpy.run_module(script, run_name='__main__', alter_sys=True)
    return 0


def run_ranks(size: int, port: str, script: str, arguments: list[str]) -> int:
    """Run a script by several ranks, as torchrun starts them."""
    from torch.distributed import TCPStore

    children = set()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(size), 'LOCAL_WORLD_SIZE': str(size)}
            os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'GROUP_RANK': '0'}
            os.environ |= {'TORCHELASTIC_USE_AGENT_STORE': 'True', 'TORCHELASTIC_RUN_ID': 'none', 'TORCHELASTIC_RESTART_COUNT': '0'}
            if rank:  # as ms-swift does when its logger is imported (4.6.0, utils/logger.py:107)
                for name in ('swift', 'modelscope'):
                    logging.getLogger(name).setLevel(logging.ERROR)
            return run_script(script, arguments)
        children.add(pid)
    store = TCPStore('127.0.0.1', int(port), is_master=True, wait_for_workers=False)  # has threads, so after the forks
    try:
        return wait_for(children)
    finally:
        del store


def run(request: dict[str, Any]) -> int:
    """In a process of its own, and in a session of its own, so that whoever asked can end all of it."""
    os.setsid()
    output = os.open(request['output'], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request['cwd'])
    os.environ |= request['env']
    if request['ranks']:
        return run_ranks(request['ranks'], request['port'], request['script'], request['arguments'])
    return run_script(request['script'], request['arguments'])


def save_time() -> None:
    """What costs each run more than its few steps: a process for the preprocessing of eight rows (datasets starts one for num_proc=1,
    ms-swift's default), the metadata of the same packages, read and parsed anew each time that a library asks for a version, a parser with
    hundreds of options for each command line, configurations that are written out for a log that nobody reads, and torch's compiler, which
    DeepSpeed imports for an optimizer that no test uses; it also starts a process whenever it looks for NUMA nodes."""
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
    importlib.metadata.version = functools.cache(importlib.metadata.version)
    if 'datasets' in sys.modules:
        from datasets import Dataset

        in_processes = Dataset.map

        @functools.wraps(in_processes)
        def mapped(self, *args, num_proc=None, **kwargs):
            return in_processes(self, *args, num_proc=None if num_proc == 1 else num_proc, **kwargs)

        Dataset.map = mapped
    if 'deepspeed' in sys.modules:
        import torch
        from deepspeed.utils import numa

        numa.get_numa_cores = functools.cache(numa.get_numa_cores)
        compiling, torch.compile = torch.compile, lambda function, **options: function
        importlib.import_module('deepspeed.runtime.zero.muon.muon_optimizer')
        torch.compile = compiling
    if 'transformers.configuration_utils' in sys.modules:
        sys.modules['transformers.configuration_utils'].PreTrainedConfig.__repr__ = object.__repr__
    if 'swift.utils.utils' in sys.modules:
        sys.modules['swift.utils.utils'].HfArgumentParser = Parsers(sys.modules['swift.utils.utils'].HfArgumentParser)


class Parsers:
    """One parser of the command line for each class of arguments.

    Args:
        make: Makes it, of a list of one class.
    """

    def __init__(self, make: Callable[[list[type]], ArgumentParser]):
        self.make, self.made = make, {}

    def __call__(self, classes: list[type]) -> ArgumentParser:
        (of,) = classes
        if of not in self.made:
            parser = self.make(classes)
            self.made[of] = parser, [copy.deepcopy(action.default) for action in parser._actions]
        parser, defaults = self.made[of]
        for action, default in zip(parser._actions, defaults, strict=True):  # what a run has done to a list does not reach the next one
            action.default = copy.copy(default)
        return parser


def serve(requests: TextIO, answers: TextIO) -> int:
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            return run(request)
        print(pid, file=answers, flush=True)
        if not request['stays']:
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
    return 0


def main(*modules: str) -> int:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for module in modules:
        importlib.import_module(module)
    save_time()
    if threading.active_count() > 1:
        raise SystemExit(f'{modules} start threads, which a fork would not have: {threading.enumerate()}')
    gc.collect()
    gc.freeze()
    return serve(requests, answers)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
