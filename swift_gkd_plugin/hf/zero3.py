"""ZeRO-3 and two forwards through one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_zero3(config: dict[str, Any] | None) -> bool:
    """Whether a configuration of DeepSpeed's, if there is one, shards parameters."""
    return bool(config) and config.get('zero_optimization', {}).get('stage') == 3


@contextmanager
def one_trace(engine: Any) -> Iterator[None]:
    """Around the student's forward, after a teacher's through the same model: one trace for both and the backward pass.

    ZeRO-3 learns in which order modules run, from the start of one forward to the start of the next, in order to gather parameters ahead
    of time and to keep those that are needed again soon (``stage3_max_reuse_distance``). Two forwards before a backward pass make it
    learn the teacher's alone, and forget it where the student's backward pass begins, in every micro-batch.

    Args:
        engine: The student's DeepSpeed engine, of any stage.
    """
    offload = getattr(engine.optimizer, 'parameter_offload', None)  # only ZeRO-3's optimizer has one
    if offload is None:
        yield
        return
    coordinator = offload.get_param_coordinator()
    coordinator.reset_step = lambda: None  # DeepSpeed 0.19 calls it in a hook in front of the model
    try:
        yield
    finally:
        del coordinator.reset_step
