"""Starts the scripts of this directory, from a process that has imported what they need."""

import importlib.util
from pathlib import Path

import starts

MODULES = ['swift_gkd_plugin.divergence._compiled', 'torch._inductor.compile_fx']
MODULES += ['swift_gkd_plugin.divergence._triton'] if importlib.util.find_spec('triton') else []
# GLOO_SOCKET_IFNAME: of the ranks.
ENVIRONMENT = {'TRITON_INTERPRET': '1', 'GLOO_SOCKET_IFNAME': 'lo'}


def run_worker(name: str, *arguments: str, cwd: Path, ranks: int = 0) -> None:
    script = Path(__file__).with_name(name)
    status, output = starts.run(script, *arguments, modules=MODULES, ranks=ranks, env=ENVIRONMENT, cwd=cwd, timeout=580)
    assert status == 0, output[-3000:]
