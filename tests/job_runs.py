"""Several training runs in one process, or in one set of ranks: saves the ten seconds of imports that a command costs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import pytest
import starts
import torch

# One optimizer step of SGD on 4 rows, whose gradient is recorded as it is.
ONE_STEP = {
    'max_steps': 1,
    'optim': 'sgd',
    'learning_rate': 0.01,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
    'lmbda': 0,
    'temperature': 1.0,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
}
# The fused weights of a tiny Qwen3-MoE's experts, for LoRA.
EXPERTS = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
IN_ORDER = {'train_dataloader_shuffle': 'false', 'dataset_shuffle': 'false'}


@dataclass(frozen=True)
class Run:
    """One training run. ``error`` is None if it ended well, ``loaded`` the number of models whose weights were loaded."""

    output_dir: Path
    error: str | None
    loaded: int
    traceback: str
    output: str

    def ok(self) -> Run:
        if self.error is not None:  # no assertion: tests expect those of stock ms-swift
            pytest.fail(f'{self.error}\n{self.traceback[-4000:]}')
        return self

    @property
    def logs(self) -> list[dict[str, Any]]:
        return self.lines('logging.jsonl')

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.logs if key in row]

    @property
    def losses(self) -> list[float]:
        return self.values('loss')

    def gradients(self, step: int = 1) -> dict[str, torch.Tensor]:
        return torch.load(self.output_dir / f'gradients-{step}.pt')

    @property
    def seen(self) -> dict[str, Any]:
        return json.loads((self.output_dir / 'seen.json').read_text())

    @property
    def memory(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by part, held by the first rank and foretold; parts of the teacher's weights are one."""
        found = json.loads((self.output_dir / 'memory.json').read_text())
        held, foretold = found['held'], found['foretold']
        told = {name: foretold.get(name, 0) for name in held}
        if 'teacher weights' in held:
            told['teacher weights'] = sum(size for name, size in foretold.items() if name.startswith('teacher weights'))
        return held, told

    @property
    def completions(self) -> list[dict[str, Any]]:
        return self.lines('completions.jsonl')

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.output_dir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


Jobs = Mapping[str, Mapping[str, Any]]


class JobRunner:
    """Runs several configurations and returns them by name.

    A configuration is a mapping of options on top of ``helpers.QUICK`` and the tiny models. Other keys: ``stop_at`` kills it after a
    step, ``dense`` forces whole logits, ``evaluate_first`` evaluates before training, ``nothing_shared`` has teacher and student do all
    of their work, ``card`` is a card of so many bytes.

    Args:
        tmp_path_factory: pytest's.
        tiny_models: The models that the options name unless they say otherwise.
        script: What reads the jobs: ``hf/jobs.py`` or a script on top of it.
        environment: Variables for every process.
        modules: What the script imports before everything else.
    """

    def __init__(
        self, tmp_path_factory, tiny_models, script: Path, environment: Mapping[str, str] | None = None, modules: Sequence[str] = ()
    ):
        self.modules = tuple(modules)
        self.tmp_path_factory, self.tiny_models, self.script, self.environment = tmp_path_factory, tiny_models, script, environment or {}
        self._numbers = itertools.count()

    def __call__(
        self, jobs: Jobs, *, nproc: int = 1, plugin: bool = True, timeout: float = 600, env: Mapping[str, str] | None = None
    ) -> dict[str, Run]:
        root = self.tmp_path_factory.mktemp(f'{self.script.stem}{next(self._numbers)}')
        listed = []
        for name, options in jobs.items():
            options = dict(options)
            hooks = {key: options.pop(key) for key in ('stop_at', 'dense', 'evaluate_first', 'nothing_shared', 'card') if key in options}
            output_dir = Path(options.pop('output_dir', root / name))
            output_dir.mkdir(parents=True, exist_ok=True)
            ranks = {'ddp_backend': 'gloo'} if nproc > 1 else {}
            merged = {
                **helpers.QUICK,
                'fp16': 'false',
                **self.tiny_models.with_teacher,
                'rlhf_type': 'gkd',
                'output_dir': output_dir,
                **ranks,
                **options,
            }
            listed.append({'argv': helpers.command_line(merged), 'output_dir': str(output_dir), 'name': name, **hooks})
        path = root / 'jobs.json'
        path.write_text(json.dumps(listed))
        variables = {**starts.ENVIRONMENT, 'SWIFT_GKD_PLUGIN': '1' if plugin else '0', **self.environment, **(env or {})}
        ranks = nproc if nproc > 1 else 0
        _, output = starts.run(
            self.script, path, modules=(*self.modules, *starts.MODULES), ranks=ranks, env=variables, cwd=root, timeout=timeout
        )
        runs = {}
        for job in listed:
            outcome = Path(job['output_dir'], 'outcome.json')
            assert outcome.exists(), f'{job["name"]} did not run:\n{output[-8000:]}'
            runs[job['name']] = Run(Path(job['output_dir']), **json.loads(outcome.read_text()), output=output)
        return runs


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The worst relative L2 difference of two gradients, tensor by tensor."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-8)).item() for n in b)
