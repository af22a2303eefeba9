"""Two data-parallel ranks, of which the first has three prompts with large images, and the second one: ``python shares.py``."""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import torch.distributed as dist


def main() -> None:
    import swift.megatron  # noqa: F401  makes megatron-core fit for a CPU
    from megatron.core import mpu

    from swift_gkd_plugin.megatron import generation
    from swift_gkd_plugin.responses import Prompt

    dist.init_process_group('gloo')
    mpu.initialize_model_parallel()
    rank, gathered, seen = dist.get_rank(), [], []
    stock = dist.all_gather_object

    def weighed(found, value, *args, **kwargs):
        gathered.append(len(pickle.dumps(value)))
        stock(found, value, *args, **kwargs)

    def answered(chunks, rows, *args):
        seen.extend((row.number, len(row.prompt), row.seed) for row in rows)
        for row in rows:
            row.answer, row.finish_reason = [row.prompt[0], row.seed], 'stop'

    @contextmanager
    def model():
        yield []

    class Generator(generation.Generator):
        def _encoded(self, inputs):
            return {'input_ids': inputs['image']}

        def _row(self, number, prompt, seed, options):
            return SimpleNamespace(number=number, prompt=prompt.encoded['input_ids'], seed=seed)

    dist.all_gather_object, generation._generate = weighed, answered
    numbers = ([1, 2, 3], [4])[rank]
    prompts = [Prompt({'image': bytes([n]) * 10**6}, {'input_ids': bytes([n]) * 10**6}) for n in numbers]
    found = Generator(None, model, [])(prompts, [10 * n for n in numbers], SimpleNamespace(max_tokens=2))
    assert [response.token_ids for response in found] == [[n, 10 * n] for n in numbers], found
    assert seen == ([(0, 10**6, 10), (2, 10**6, 30)], [(1, 10**6, 20), (3, 10**6, 40)])[rank], seen
    assert max(gathered) < 1000, gathered
    print('each its own')


if __name__ == '__main__':
    main()
