"""Many training runs in one process group: ``python jobs.py jobs.json``, by the ranks of fork_server.py.

Each job is an argument list for ``megatron_rlhf_main``, the function behind ``megatron rlhf``. All jobs of one call have the same layout:
megatron-core sets up its process groups once per process.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import os
import sys
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def cap_logits() -> None:
    """Have models with a soft-cap in their configuration apply it, by the method of Gemma's."""
    from mcore_bridge.model import GPTModel
    from mcore_bridge.model.mm_gpts.gemma4 import Gemma4TextGPTModel
    from mcore_bridge.model.register import ModelLoader

    class Capped(GPTModel):
        _forward_output_layer = Gemma4TextGPTModel._forward_output_layer
        final_logit_softcapping = property(lambda self: self.config.hf_config.final_logit_softcapping)

    chosen = ModelLoader.__init__

    def capped(self, config):
        chosen(self, config)
        if hasattr(config.hf_config, 'final_logit_softcapping'):
            self.model_cls = Capped

    ModelLoader.__init__ = capped


def gather_gradients(trainer) -> None:
    """Of a distributed optimizer, where each data-parallel rank has the sum of its own part alone."""
    for model in trainer.wrapped_models:
        for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
            for bucket in group.buckets:
                size, rank = group.intra_distributed_optimizer_instance_size, group.intra_distributed_optimizer_instance_rank
                mine = bucket.grad_data.chunk(size)[rank].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group.intra_distributed_optimizer_instance_group)


def exported_gradients(trainer) -> dict[str, torch.Tensor]:
    """The gradients under the names of transformers, put together from all ranks: the bridge exports them in place of the weights."""
    trained = [p for model in trainer.unwrapped_models for p in model.parameters() if p.requires_grad]
    weights = [p.data for p in trained]
    lora = trainer.args.tuner_type == 'lora'
    for p in trained:
        p.data = p.main_grad.to(p.dtype).view(p.shape).clone()
    try:
        exported = trainer.bridge.export_weights(trainer.unwrapped_models, peft_format=lora)
        return {name: value.detach().clone() for name, value in exported}
    finally:
        for p, data in zip(trained, weights, strict=True):
            p.data = data


class Caches:
    """Counts the tokens that all caches of this process have room for, after each pass of a generation, and those of a micro-batch that go
    through the model in it, of which it allows 300: more than any one prompt."""

    def __init__(self):
        from swift_gkd_plugin.megatron import generation

        self.made: list[weakref.ref] = []
        self.most = self.widest = 0
        generation.PASS_TOKENS = 300
        make, run = generation.StaticInferenceContext, generation._pass

        def made(*args):
            cache = make(*args)
            self.made.append(weakref.ref(cache))
            return cache

        def counted(chunks, batches, *args):
            self.widest = max(self.widest, *(batch.inputs(torch.device('cpu'), False)['input_ids'].numel() for batch in batches))
            found = run(chunks, batches, *args)
            self.made = [cache for cache in self.made if cache() is not None]
            filled = [cache() for cache in self.made if cache().key_value_memory_dict]
            self.most = max(self.most, sum(cache.max_batch_size * cache.max_sequence_length for cache in filled))
            return found

        generation.StaticInferenceContext, generation._pass = made, counted


def held(trainer) -> dict[str, int]:
    """Bytes that this rank has allocated, by part; of an adapter nothing."""

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    frozen = trainer.args.tuner_type != 'full'
    weights = (p for model in trainer.unwrapped_models for p in model.parameters() if not (frozen and p.requires_grad))
    found = {'student weights': size(weights)}
    if trainer.teacher_models is not None:
        head = trainer.teacher.loss_head
        found['teacher weights'] = size(p for chunk in trainer.teacher.chunks for p in chunk.parameters())
        found["teacher's head in the student's layout"] = 0 if head is trainer.teacher.head else size([head.tensors().weight])
    if frozen:
        return found
    found['gradients'] = size(b.grad_data for model in trainer.wrapped_models for b in (*model.buffers, *model.expert_parallel_buffers))
    found['optimizer'] = size(of_optimizer(trainer))
    return found


def of_optimizer(trainer) -> Iterator[torch.Tensor]:
    """fp32 weights and moments."""
    for one in getattr(trainer.optimizer, 'chained_optimizers', [trainer.optimizer]):
        yield from itertools.chain(*(getattr(one, 'shard_fp32_from_float16_groups', None) or getattr(one, 'fp32_from_float16_groups', [])))
        yield from (t for state in one.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim())


class Foretold:
    """What was foretold of this rank, the last one, by part."""

    bytes: dict[str, int] = {}

    @classmethod
    def keep(cls) -> None:
        from swift_gkd_plugin.megatron import memory
        from swift_gkd_plugin.memory import verdict

        announce = verdict.announce

        def kept(setup, *rest):
            parts = memory._parts(setup, setup.layout.pp - 1, setup.own.pp - 1)
            cls.bytes = {part.name: part.bytes for part in parts if part.exact}
            announce(setup, *rest)

        verdict.announce = kept


class Foreign:
    """An attention that is none of the models'."""


def make_recorder(caches: Caches):
    from swift.megatron.callbacks.base import MegatronCallback

    from swift_gkd_plugin.megatron.teachers import LocalTeacher
    from swift_gkd_plugin.responses.local import inference_template

    class Recorder(MegatronCallback):
        """``gradients.pt``: the first step's gradient. ``batches.pt``: its micro-batches, of a run with one data-parallel rank.
        ``answers_rank<r>.json``: the responses that this rank was given, with their prompts.
        ``seen.json``: the largest tensor that was saved for a backward pass, in elements; what the teacher left behind, what this rank
        kept of its pass, the forwards that took, and the bytes of the student's gradients and optimizer meanwhile; of the generated
        responses for how many tokens there were keys and values at once, and the most tokens of a micro-batch's pass."""

        def on_train_begin(self) -> None:
            trainer, step = self.trainer, self.trainer.optimizer.step
            self.batches: list[dict[str, Any]] = []
            self.collated: list[list[Any]] = []
            self.answers: list[dict[str, Any]] = []
            self.seen = {'payload': 0, 'payload_dtype': None, 'kept': 0, 'gradient_bytes': 0, 'optimizer_bytes': 0, 'forwards': 0}
            encode = trainer.conductor.encoder.micro_batch

            def remembered(samples):
                batch = encode(samples)
                if any(samples is known for known in self.collated):  # for a teacher that has looked before the student
                    return batch
                self.collated.append(samples)
                self.answers += [self.answer(sample) for sample in samples if sample.row.counts and sample.response is not None]
                if trainer.state.iteration == 0:
                    self.batches.append({k: v for k, v in vars(batch).items() if k != 'samples'})
                return batch

            trainer.conductor.encoder.micro_batch = remembered
            if isinstance(trainer.teacher, LocalTeacher):
                signals = trainer.teacher.signals

                def weighed(*args, **kwargs):
                    found = signals(*args, **kwargs)
                    states = [s.hidden for s in found if hasattr(s, 'hidden')]
                    self.seen['payload'] = max(self.seen['payload'], sum(s.numel() for s in states))
                    if states:
                        self.seen['payload_dtype'] = str(states[0].dtype)
                    return found

                states = trainer.teacher._states

                def kept(*args, **kwargs):
                    buffers = itertools.chain.from_iterable(m.buffers + m.expert_parallel_buffers for m in trainer.wrapped_models)
                    room = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
                    self.seen['gradient_bytes'] = max(self.seen['gradient_bytes'], room)
                    state = sum(tensor.untyped_storage().nbytes() for tensor in of_optimizer(trainer))
                    self.seen['optimizer_bytes'] = max(self.seen['optimizer_bytes'], state)
                    found = states(*args, **kwargs)
                    self.seen['forwards'] = max(self.seen['forwards'], len(args[0]))
                    self.seen['kept'] = max(self.seen['kept'], sum(s.numel() for s in found))
                    return found

                trainer.teacher.signals, trainer.teacher._states = weighed, kept

            def recorded():
                if trainer.state.iteration == 0:
                    if self.args.use_distributed_optimizer:
                        gather_gradients(trainer)
                    gradients = exported_gradients(trainer)
                    if dist.get_rank() == 0:
                        torch.save(gradients, Path(self.args.output_dir) / 'gradients.pt')
                        torch.save(self.batches, Path(self.args.output_dir) / 'batches.pt')
                return step()

            trainer.optimizer.step = recorded

        def answer(self, sample) -> dict[str, Any]:
            encoder, state = self.trainer.conductor.encoder, self.trainer.state
            view = encoder.student_prompt if sample.source == 'student' else encoder.teacher_prompt
            with inference_template(encoder.template) as template:
                prompt = template.encode(view(sample))['input_ids']
            when = {'step': state.iteration, 'training': not self.trainer.conductor.books.evaluating}
            return {**when, 'key': sample.row.key, 'source': sample.source, 'prompt': prompt, **vars(sample.response)}

        def on_step_end(self) -> None:
            if os.environ['SAVE'] == '0':
                self.state.should_save = False  # stock saves after the last step, whatever --save_steps says

        def on_train_end(self) -> None:
            writers = [c.jsonl_writer for c in self.trainer.callbacks if hasattr(c, 'jsonl_writer')]
            self.seen['log_writers'] = len(writers)
            self.seen['cached_tokens'], self.seen['pass_tokens'] = caches.most, caches.widest
            self.seen['log_threads'] = sum(writer._thread is not None for writer in writers)
            if dist.get_rank() == dist.get_world_size() - 1:
                self.seen['held'], self.seen['foretold'] = held(self.trainer), Foretold.bytes
                Path(self.args.output_dir, 'seen.json').write_text(json.dumps(self.seen))
            Path(self.args.output_dir, f'answers_rank{dist.get_rank()}.json').write_text(json.dumps(self.answers))
            if os.environ['EXPORT'] == '1':
                with self.trainer.gathered_weights():
                    weights = {k: v.clone() for k, v in self.trainer.bridge.export_weights(self.trainer.unwrapped_models)}
                if dist.get_rank() == 0:
                    torch.save(weights, Path(self.args.output_dir) / 'weights.pt')

    return Recorder


def main(path: str) -> None:
    from swift_gkd_plugin import register

    register()
    listed = json.loads(Path(path).read_text())
    from swift.megatron import megatron_rlhf_main
    from swift.megatron.callbacks import megatron_callbacks_map

    cap_logits()
    Foretold.keep()
    caches = Caches()
    megatron_callbacks_map['recorder'] = make_recorder(caches)
    dist.destroy_process_group = lambda *args: None  # at the end of every run; the next one needs it
    loaded = []
    from mcore_bridge import GPTBridge
    from mcore_bridge.bridge import gpt_bridge

    load = GPTBridge.load_weights

    def counted(*args, **kwargs):
        loaded.append(1)
        return load(*args, **kwargs)

    GPTBridge.load_weights = counted
    if any('--vllm_mode' in job['argv'] for job in listed):
        import engine

        from swift_gkd_plugin.megatron.trainer import GKDTrainer

        engine.install(GKDTrainer)
    from swift_gkd_plugin.megatron import generation, options
    from swift_gkd_plugin.memory.verdict import Card

    options.time = SimpleNamespace(sleep=lambda seconds: None)  # here no rank ends the others
    keeps_cache, attention, python_path = generation.keeps_cache, generation.Attention, os.environ['PYTHONPATH']
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    for job in listed:
        gc.collect()
        gc.freeze()  # ms-swift collects garbage in every run, and would look through whatever has been imported
        os.environ['EXPORT'], os.environ['SAVE'] = str(int(job['export'])), str(int(job['save']))
        generation.keeps_cache = (lambda model: False) if job['no_cache'] else keeps_cache
        generation.Attention = Foreign if job['foreign'] else attention
        os.environ['PYTHONPATH'] = '' if job['no_path'] else python_path
        card = Card('cuda:0', job['card']) if job['card'] else None
        Card.of_this_rank = lambda card=card: card
        error, trace = None, ''
        loaded.clear()
        caches.most = caches.widest = 0
        # The bridge remembers the groups of the first model in the process, be it one without experts.
        gpt_bridge.EP_PP_SIZE = gpt_bridge.EP_PP_GROUP = gpt_bridge.EP_PP_RANK = None
        try:
            megatron_rlhf_main(job['argv'])
        except BaseException as e:
            error, trace = f'{type(e).__name__}: {e}', traceback.format_exc()
            print(trace, flush=True)
        if rank == world_size - 1:
            Path(job['output_dir'], 'outcome.json').write_text(json.dumps({'error': error, 'loaded': len(loaded), 'traceback': trace}))
        if dist.is_initialized():
            dist.barrier()
    sys.stdout.flush()
    atexit._run_exitfuncs()  # those of multiprocessing end the processes that wrote checkpoints
    os._exit(0)  # gloo's threads would keep the interpreter


if __name__ == '__main__':
    main(sys.argv[1])
