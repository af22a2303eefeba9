"""What student, teacher, payload and operator take on each rank, as a function of the layout: the memory model of the package
(``swift_gkd_plugin.memory``) for published models, and against what small ones have allocated.

python benchmarks/megatron/memory.py            the table for Qwen3-235B-A22B -> Qwen3-30B-A3B
python benchmarks/megatron/memory.py --check    small models in three layouts on CPU: measured against the model, into memory.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from swift_gkd_plugin.memory.estimates import BF16, operator_bytes, payload_bytes
from swift_gkd_plugin.memory.layout import Layout, head_bytes, parameters, student_bytes
from swift_gkd_plugin.memory.sizes import ModelSize

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model, dense or with experts in every layer, embedding and head untied."""

    hidden: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    ffn: int  # of each expert, with experts
    experts: int = 0

    def model(self) -> Any:
        from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

        common: dict[str, Any] = dict(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
        )
        if self.experts:
            moe = dict(num_experts=self.experts, num_experts_per_tok=2, moe_intermediate_size=self.ffn, norm_topk_prob=True)
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **moe, decoder_sparse_step=1))
        return Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=self.ffn))

    @cached_property
    def size(self) -> ModelSize:
        with torch.device('meta'):
            return ModelSize.of(self.model().bfloat16())


def teacher_bytes(teacher: Shape, own: Layout, stage: int, student: Layout, student_last: bool) -> dict[str, int]:
    """Weights, and in a layout of its own the rows of its head that belong to the student's vocabulary shard."""
    head = head_bytes(teacher.size, student) if own != student and student_last else 0
    return {'teacher weights': BF16 * sum(parameters(teacher.size, own, stage)), 'teacher head': head}


def estimate(
    student: Shape, layout: Layout, teacher: Shape, own: Layout, tokens: int, longest: int, trained: bool = True
) -> dict[str, int]:
    """The fullest rank. ``tokens``: trained tokens that a data-parallel rank owns in a step; ``longest``: of one micro-batch."""

    def rank(stage: int, of_teacher: int) -> dict[str, int]:
        last = stage == layout.pp - 1
        return {
            **student_bytes(student.size, layout, stage, trained=trained),
            **teacher_bytes(teacher, own, of_teacher, layout, last),
            'payload': payload_bytes(teacher.hidden, tokens // layout.cp) if last else 0,
            'operator': operator_bytes(student.hidden, width, longest // layout.cp, sharded=layout.tp > 1, trained=trained) if last else 0,
        }

    width = math.ceil(student.vocab / layout.tp)
    # Stages are consecutive ranks in both layouts.
    places = [(r // (layout.world // layout.pp), r // (layout.world // own.pp)) for r in range(layout.world)]
    return max((rank(*place) for place in places), key=lambda found: sum(found.values()))


QWEN3_30B = Shape(hidden=2048, layers=48, heads=32, groups=4, head_dim=128, vocab=151936, ffn=768, experts=128)
QWEN3_235B = Shape(hidden=4096, layers=94, heads=64, groups=4, head_dim=128, vocab=151936, ffn=1536, experts=128)
# GPUs, the student's and the teacher's layout, and whether all of the student is trained. 94 layers split into 2 stages, not into 4.
PLANS: tuple[tuple[str, Layout, Layout, bool], ...] = (
    ('8 GPUs, LoRA, one layout', Layout(8, ep=8), Layout(8, ep=8), False),
    ('8 GPUs, LoRA, teacher TP 8', Layout(8, ep=8), Layout(8, tp=8, ep=8), False),
    ('8 GPUs, full, teacher TP 8', Layout(8, ep=8), Layout(8, tp=8, ep=8), True),
    ('64 GPUs, full, one layout', Layout(64, pp=2, ep=8), Layout(64, pp=2, ep=8), True),
    ('64 GPUs, full, teacher TP 8 EP 32 PP 2', Layout(64, ep=8), Layout(64, tp=8, pp=2, ep=32), True),
)
STEP, SEQUENCE = 64 * 4096, 4096  # trained tokens of a step, of all ranks; tokens of a micro-batch


def table() -> None:
    names = ['student weights', 'student gradients', 'optimizer', 'teacher weights', 'teacher head', 'payload', 'operator']
    print('| GiB per GPU | ' + ' | '.join(names) + ' | sum |\n|' + '---|' * (len(names) + 2))
    for name, layout, own, trained in PLANS:
        found = estimate(QWEN3_30B, layout, QWEN3_235B, own, STEP // layout.dp, SEQUENCE, trained)
        cells = [f'{found.get(key, 0) / 2**30:.1f}' for key in names]
        print(f'| {name} | ' + ' | '.join(cells) + f' | {sum(found.values()) / 2**30:.1f} |')


SMALL = Shape(hidden=128, layers=4, heads=4, groups=2, head_dim=32, vocab=4096, ffn=256)
SMALL_TEACHER = Shape(hidden=256, layers=4, heads=4, groups=2, head_dim=64, vocab=4096, ffn=512)
SMALL_MOE = Shape(hidden=128, layers=4, heads=4, groups=2, head_dim=32, vocab=4096, ffn=128, experts=8)
CHECKED: tuple[tuple[str, str, Shape, Layout, Shape, Layout], ...] = (
    ('dense, DP 2, teacher TP 2', 'DP2', SMALL, Layout(2), SMALL_TEACHER, Layout(2, tp=2)),
    ('dense, TP 2 x PP 2', 'TP2xPP2', SMALL, Layout(4, tp=2, pp=2), SMALL_TEACHER, Layout(4, tp=2, pp=2)),
    ('experts, EP 2, teacher PP 2', 'EP2', SMALL_MOE, Layout(2, ep=2), SMALL_MOE, Layout(2, pp=2)),
)


def write_models(root: Path, tokenizer: Path) -> dict[Shape, Path]:
    from transformers import AutoTokenizer

    paths = {}
    for number, shape in enumerate((SMALL, SMALL_TEACHER, SMALL_MOE)):
        paths[shape] = root / str(number)
        shape.model().save_pretrained(paths[shape])
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(paths[shape])
    return paths


TOKENS = 2048  # of the micro-batch with which the operator is weighed; the training runs have a few


def operator_peak(hidden: int, teacher_hidden: int, width: int) -> int:
    """The most that ``linear_divergence`` allocates at a time, on a CPU, for one vocabulary shard."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from swift_gkd_plugin.divergence import Divergence, linear_divergence

    class Weighed(TorchDispatchMode):
        def __init__(self, given):
            super().__init__()
            self.now = self.peak = 0
            self.known = weakref.WeakSet(t.untyped_storage() for t in given)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.untyped_storage() not in self.known:
                    storage = t.untyped_storage()
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage.nbytes())
            return out

        def freed(self, count: int) -> None:
            self.now -= count

    shapes = (TOKENS, hidden), (width, hidden), (TOKENS, teacher_hidden), (width, teacher_hidden)
    tensors = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    for t in tensors[:2]:
        t.requires_grad_()
    with Weighed(tensors) as weighed:
        linear_divergence(*tensors, Divergence(beta=0.5), token_weights=torch.ones(TOKENS), reduction='sum')
    return weighed.peak


def check(path: Path) -> None:
    """Run one step in each layout and compare what the ranks of the last stage have allocated."""
    tests = HERE.parents[1] / 'tests'
    sys.path[:0] = [str(tests), str(tests / 'megatron')]
    import helpers
    from runs import run_jobs

    os.environ.update(helpers.OFFLINE)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        tiny = helpers.make_tiny_models(Path(directory, 'tiny'))
        paths = write_models(Path(directory), tiny.student)
        for name, key, student, layout, teacher, own in CHECKED:
            kind = 'qwen3_moe' if student.experts else 'qwen3'
            sizes = {'tensor_model': own.tp, 'pipeline_model': own.pp, 'expert_model': own.ep}
            job = {
                'model': paths[student],
                'teacher_model': paths[teacher],
                'model_type': kind,
                'teacher_model_type': kind,
                'torch_dtype': 'bfloat16',
                'bf16': 'true',
                'use_distributed_optimizer': 'true',
                'train_iters': 1,
                'external_plugins': HERE / 'memory_probe.py',
                'callbacks': 'memory_probe',
                **({f'teacher_{k}_parallel_size': v for k, v in sizes.items()} if own != layout else {}),
            }
            root = Path(directory, key)
            root.mkdir()
            run = run_jobs({'memory': job}, key, root, {}, tiny.train)['memory'].ok()
            seen = json.loads((run.output_dir / 'memory.json').read_text())
            stage = layout.pp - 1
            expected = {
                **student_bytes(student.size, layout, stage),
                **teacher_bytes(teacher, own, own.pp - 1, layout, True),
                'payload': payload_bytes(teacher.hidden, seen['trained tokens']),
            }
            width = math.ceil(student.vocab / layout.tp)
            expected['operator'] = operator_bytes(student.hidden, width, TOKENS, device='cpu')
            seen['operator'] = operator_peak(student.hidden, teacher.hidden, width)
            for part, value in expected.items():
                ratio = f'{seen[part] / value:.3f}' if value else ''
                rows.append((name, part, value, seen[part], ratio))
                print(*rows[-1], sep='\t', flush=True)
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('run', 'part', 'bytes by the model', 'bytes measured', 'measured / model'))
        writer.writerows(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--csv', type=Path, default=HERE / 'memory.csv')
    options = parser.parse_args()
    check(options.csv) if options.check else table()
