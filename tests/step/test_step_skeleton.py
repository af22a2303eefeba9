"""The loop that the architecture page gives to who writes another back end."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_backend import CPU, FakeBackend, arguments

from swift_gkd_plugin.divergence import Divergence, TokenStats
from swift_gkd_plugin.sources import Draw
from swift_gkd_plugin.step.conductor import Conductor
from swift_gkd_plugin.step.data import row_loader
from swift_gkd_plugin.step.objective import LossOptions
from swift_gkd_plugin.step.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


def skeleton(language: str) -> str:
    (code,) = re.findall(r'```python\n(conductor = .*?)```', (ROOT / f'docs_{language}' / 'architecture.md').read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize('language', ['en', 'zh'])
def test_it_trains_as_it_stands_there(make, template, dataset, tmp_path, language):
    args = arguments(tmp_path, lmbda=0.0, max_steps=3)
    weights = torch.zeros(512, dtype=torch.float64, requires_grad=True)

    def loss(batch):
        divergence = (weights[batch.labels] - batch.signal.logprobs[:, 0]) ** 2
        return (divergence * batch.weights).sum(), TokenStats(divergence=divergence.detach().float())

    logs: list[dict[str, float]] = []
    names = {
        **{'args': args, 'template': template, 'dataset': dataset, 'checkpoint': None, 'answering': None},
        **{'loss': loss, 'log': logs.append, 'optimizer': torch.optim.SGD([weights], args.learning_rate)},
        **{'backend': FakeBackend(args, Ranks(CPU), template), 'options': LossOptions(Divergence(), 1.0, 0.0, 'bucket', None)},
        **{'teacher': SimpleNamespace(description='a table', host_copy=None)},
        **{'Conductor': Conductor, 'Draw': Draw, 'row_loader': row_loader},
    }
    exec(skeleton(language), names)
    whole = make(lmbda=0, max_steps=3).train()
    assert names['backend'].step == 3 and [log['loss'] for log in logs] == pytest.approx(whole.losses, rel=1e-9)
    assert weights.tolist() == pytest.approx(whole.backend.weights.tolist(), rel=1e-9)
