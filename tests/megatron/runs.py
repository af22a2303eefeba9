"""Starts the ranks of jobs.py and reads what it leaves; used by the tests and by parity.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import pytest
import starts
import torch
from models import QUICK

HERE = Path(__file__).parent
CPU = {'PYTHONPATH': str(HERE / 'cpu'), 'MEGATRON_ON_CPU': '1', 'MASTER_ADDR': '127.0.0.1', 'USE_HF': '1'}

# What every run imports.
MODULES = ('swift.megatron.pipelines.train.rlhf', 'swift_gkd_plugin.megatron.trainer', 'matplotlib.pyplot')

# Ranks and options of each layout.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    '1': (1, {}),
    'TP2': (2, {'tensor_model_parallel_size': 2}),
    # Where there are experts, they are split over the same ranks: by matrix in TP2+SP, one by one in TP2xCP2.
    'TP2+SP': (2, {'tensor_model_parallel_size': 2, 'sequence_parallel': 'true', 'expert_tensor_parallel_size': 2}),
    'PP2': (2, {'pipeline_model_parallel_size': 2}),
    'CP2': (2, {'context_parallel_size': 2}),
    'DP2': (2, {}),
    'EP2': (2, {'expert_model_parallel_size': 2}),
    'TP2xPP2': (4, {'tensor_model_parallel_size': 2, 'pipeline_model_parallel_size': 2}),
    'TP2xCP2': (
        4,
        {
            'tensor_model_parallel_size': 2,
            'context_parallel_size': 2,
            'sequence_parallel': 'true',
            'expert_model_parallel_size': 2,
        },
    ),
    'PP2xVPP2': (2, {'pipeline_model_parallel_size': 2, 'virtual_pipeline_model_parallel_size': 2}),
    # Three kinds at once; experts are split by matrix, one by one, or both, and their data-parallel ranks are not the others'.
    'TP2xPP2xDP2': (
        8,
        {
            'tensor_model_parallel_size': 2,
            'pipeline_model_parallel_size': 2,
            'sequence_parallel': 'true',
            'expert_tensor_parallel_size': 2,
        },
    ),
    'TP2xPP2xCP2': (
        8,
        {
            'tensor_model_parallel_size': 2,
            'pipeline_model_parallel_size': 2,
            'context_parallel_size': 2,
            'sequence_parallel': 'true',
            'expert_model_parallel_size': 2,
        },
    ),
    'TP2xDP4, EP2xETP2xDP2': (
        8,
        {
            'tensor_model_parallel_size': 2,
            'sequence_parallel': 'true',
            'expert_model_parallel_size': 2,
            'expert_tensor_parallel_size': 2,
            'use_distributed_optimizer': 'true',
        },
    ),
    'TP2xCP2xDP2': (
        8,
        {
            'tensor_model_parallel_size': 2,
            'context_parallel_size': 2,
            'sequence_parallel': 'true',
            'expert_model_parallel_size': 2,
        },
    ),
    'TP2xPP2xVPP2xDP2, overlapped': (
        8,
        {
            'tensor_model_parallel_size': 2,
            'pipeline_model_parallel_size': 2,
            'virtual_pipeline_model_parallel_size': 2,
            'sequence_parallel': 'true',
            'expert_model_parallel_size': 2,
            'use_distributed_optimizer': 'true',
            'overlap_grad_reduce': 'true',
            'overlap_param_gather': 'true',
            'recompute_granularity': 'full',
            'recompute_method': 'uniform',
            'recompute_num_layers': 1,
        },
    ),
    'DP8, teacher TP8': (8, {'teacher_tensor_model_parallel_size': 8}),
}

Jobs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training run. ``error`` is None if it ended well, ``loaded`` the number of times that weights were loaded."""

    output_dir: Path
    error: str | None
    loaded: int
    traceback: str
    output: str

    def ok(self) -> Run:
        assert self.error is None, f'{self.error}\n{self.traceback[-4000:]}'
        return self

    @property
    def logs(self) -> list[dict[str, Any]]:
        path = self.output_dir / 'logging.jsonl'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.logs if key in row]

    @property
    def losses(self) -> list[float]:
        return self.values('loss')

    def saved(self, name: str) -> Any:
        return torch.load(self.output_dir / f'{name}.pt', weights_only=False)

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        return self.saved('gradients')

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The responses of all ranks; those of ranks with the same rows are there several times."""
        return [answer for path in self.output_dir.glob('answers_rank*.json') for answer in json.loads(path.read_text())]

    @property
    def seen(self) -> dict[str, Any]:
        return json.loads((self.output_dir / 'seen.json').read_text())


def compare_memory(run: Run) -> None:
    """What the last rank held with what was foretold of it: to the byte, but for the padding of megatron-core's gradient buffers, which the
    distributed optimizer shares out."""
    padding = {'gradients': 0.02, 'optimizer': 1e-3}
    held, foretold = run.seen['held'], run.seen['foretold']
    for name, size in held.items():
        told = sum(n for part, n in foretold.items() if part.startswith(name))
        assert told == (pytest.approx(size, rel=padding[name]) if name in padding else size), (run.output_dir.name, name, size, told)


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The worst relative L2 difference of two gradients, tensor by tensor."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return max(((a[n].double() - b[n].double()).norm() / b[n].double().norm().clamp_min(1e-8)).item() for n in b)


def run_jobs(
    jobs: Jobs,
    layout: str,
    root: Path,
    models: Mapping[str, Path],
    train: Path,
    *,
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
    modules: Sequence[str] = (),
) -> dict[str, Run]:
    """Run configurations in one process group.

    Args:
        jobs: Options on top of QUICK, by name; ``model`` and ``teacher_model`` are names of :func:`models.make_models`. The key
            ``export`` keeps the trained weights, ``save`` lets checkpoints be written, ``no_cache`` generates without keys and values
            that are kept, ``foreign`` has no attention taken for megatron-core's, ``card`` is a card of so many bytes, ``no_path`` leaves
            processes that it starts without PYTHONPATH, ``output_dir`` says where another run lies.
        layout: A key of LAYOUTS.
        modules: What is imported before everything else.
    """
    ranks, split = LAYOUTS[layout]
    listed = []
    for name, options in jobs.items():
        options = dict(options)
        keep = {key: options.pop(key, False) for key in ('export', 'save', 'no_cache', 'foreign', 'card', 'no_path')}
        output_dir = Path(options.pop('output_dir', root / name))
        output_dir.mkdir(parents=True, exist_ok=True)
        merged = {**QUICK, 'dataset': train, 'output_dir': output_dir, 'model': 'student', 'teacher_model': 'teacher', **split, **options}
        for key, kind in (('model', 'model_type'), ('teacher_model', 'teacher_model_type')):
            given = merged[key]
            if given in models:
                merged[key] = models[given]
                merged[kind] = 'qwen2' if given == 'qwen2' else 'qwen3_moe' if given.startswith('moe') else 'qwen3'
        for key in {'adapters', 'teacher_adapters'} & merged.keys():
            merged[key] = models.get(merged[key], merged[key])
        listed.append({'argv': helpers.command_line(merged), 'output_dir': str(output_dir), 'name': name, **keep})
    path = root / 'jobs.json'
    path.write_text(json.dumps(listed))
    # For one rank too: a process group needs its variables.
    variables = {**CPU, **(env or {})}
    _, output = starts.run(HERE / 'jobs.py', path, modules=(*modules, *MODULES), ranks=ranks, env=variables, cwd=root, timeout=timeout)
    found = {}
    for job in listed:
        outcome = Path(job['output_dir'], 'outcome.json')
        assert outcome.exists(), f'{job["name"]} did not run:\n{output[-8000:]}'
        found[job['name']] = Run(Path(job['output_dir']), **json.loads(outcome.read_text()), output=output)
    return found
