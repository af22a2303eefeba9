"""What a rank of megatron-core holds of a model: the layers of its stage, the parts of them that tensor and expert parallelism give it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .estimates import BF16, FP32
from .sizes import ModelSize, Weight

# Which every rank has whole: what routes tokens to experts, and the narrow halves of latent attention.
WHOLE = ('gate.weight', 'router.weight', 'shared_expert_gate.weight', 'q_a_proj.weight', 'kv_a_proj_with_mqa.weight')
# Their inputs are split, so that each rank adds the bias to a sum.
ROW_PARALLEL = ('o_proj', 'down_proj', 'out_proj', 'dense_4h_to_h')


@dataclass(frozen=True)
class Layout:
    """A model's layout on ``world`` ranks."""

    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        return self.world // (self.etp * self.ep * self.pp)


def is_whole(weight: Weight) -> bool:
    if weight.name.endswith(WHOLE):
        return True
    bias = weight.name.endswith('.bias') and any(name in weight.name for name in ROW_PARALLEL)
    return len(weight.shape) == 1 and (bias or 'norm' in weight.name)


def parameters(size: ModelSize, layout: Layout, stage: int) -> tuple[int, int]:
    """(numbers outside of the experts, numbers in experts) of one rank of a pipeline stage. Layers are dealt out evenly; the embedding and
    what is not of the language model are on the first stage, the head and the last norm on the last, tied tables on both."""
    dense = expert = 0
    per_stage = -(-size.inside.layers // layout.pp)
    first, last = stage == 0, stage == layout.pp - 1
    for w in size.weights:
        if w.name in (size.embedding, size.head):
            copies = first if w.name == size.embedding else 0
            if w.name == size.head:
                copies = max(copies, last)
            dense += copies * math.ceil(w.shape[0] / layout.tp) * math.prod(w.shape[1:])
        elif w.layer is None:
            of_last = w.name.rpartition('.')[0].endswith('norm') and 'vis' not in w.name and 'audio' not in w.name
            dense += (last if of_last else first) * w.numbers
        elif w.layer // per_stage == stage:
            if '.experts.' in w.name:
                expert += w.numbers // (layout.ep * layout.etp)
            else:
                dense += w.numbers if is_whole(w) else w.numbers // layout.tp
    return dense, expert


def student_bytes(
    size: ModelSize,
    layout: Layout,
    stage: int,
    *,
    trained: bool = True,
    itemsize: int = BF16,
    gradient: int = FP32,
    state: int = 3 * FP32,
    distributed: bool = True,
) -> dict[str, int]:
    """Weights, gradients in DDP's buffers, and the optimizer: its fp32 weights and two moments, shared out over the data-parallel ranks.
    With LoRA (``trained`` false) the weights alone.

    Args:
        itemsize, gradient, state: Bytes of a number, of its gradient, and of what the optimizer keeps of it.
        distributed: Whether data-parallel ranks share the optimizer.
    """
    dense, expert = parameters(size, layout, stage)
    found = {'student weights': itemsize * (dense + expert)}
    if trained:
        found['student gradients'] = gradient * (dense + expert)
        shares = (layout.dp * layout.cp, layout.expert_dp) if distributed else (1, 1)
        found['optimizer'] = state * (dense // shares[0] + expert // shares[1])
    return found


def head_bytes(teacher: ModelSize, layout: Layout) -> int:
    """The rows of a relocated teacher's head that belong to a rank's vocabulary shard of the student, whose layout this is."""
    return teacher.inside.itemsize * math.ceil(teacher.inside.vocab / layout.tp) * teacher.inside.hidden
