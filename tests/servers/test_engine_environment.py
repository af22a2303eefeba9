"""What an engine beside a training process gets of that one's environment."""

from __future__ import annotations

import pytest

from swift_gkd_plugin.teachers import engine


@pytest.mark.parametrize(
    ('given', 'left'),
    [
        ('expandable_segments:True', None),
        ('max_split_size_mb:512, expandable_segments: True', 'max_split_size_mb:512'),
        ('roundup_power2_divisions:[256:1,512:2],expandable_segments:True', 'roundup_power2_divisions:[256:1,512:2]'),
        ('expandable_segments:False', 'expandable_segments:False'),
        (None, None),
    ],
)
@pytest.mark.parametrize('name', ['PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_ALLOC_CONF'])
def test_an_engine_that_sleeps_has_no_expandable_segments(monkeypatch, name, given, left):
    for other in engine.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    said = []
    monkeypatch.setattr(engine.logger, 'info', said.append)
    assert engine.environment(['0']).get(name) == left
    assert len(said) == (given != left)
    assert engine.environment(None).get(name) == given


def test_it_has_no_rank(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'one')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5')
    found = engine.environment(['5'])
    assert 'RANK' not in found and 'TORCHELASTIC_RUN_ID' not in found and found['CUDA_VISIBLE_DEVICES'] == '5'
