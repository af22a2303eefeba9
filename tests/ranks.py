"""``python ranks.py N PORT script.py ...``: N ranks on this machine, as torchrun starts them, parted after the slow imports.

A rank of its own needs six seconds for those, and torchrun three more. What asks for its rank when it is imported, as ms-swift's logger
does, is left to the ranks.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
from pathlib import Path


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


def main(size: str, port: str, script: str, *arguments: str) -> int:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from torch.distributed import TCPStore
    from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, Trainer  # noqa: F401

    gc.freeze()
    sys.stdout.flush()
    ranks = set()
    for rank in map(str, range(int(size))):
        pid = os.fork()
        if pid == 0:
            os.environ |= {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': size, 'LOCAL_WORLD_SIZE': size}
            os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'GROUP_RANK': '0'}
            os.environ |= {'TORCHELASTIC_USE_AGENT_STORE': 'True', 'TORCHELASTIC_RUN_ID': 'none', 'TORCHELASTIC_RESTART_COUNT': '0'}
            sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
            runpy.run_path(script, run_name='__main__')
            return 0
        ranks.add(pid)
    store = TCPStore('127.0.0.1', int(port), is_master=True, wait_for_workers=False)  # has threads, so after the forks
    try:
        return wait_for(ranks)
    finally:
        del store


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
