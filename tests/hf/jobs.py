"""Many training runs in one process: ``python jobs.py jobs.json``, alone or by the ranks of fork_server.py.

Each job is an argument list for ``swift.pipelines.rlhf_main``, the function behind ``swift rlhf``; one process saves the ten seconds of
imports that a command costs. With SWIFT_GKD_PLUGIN=0 the same jobs run stock ms-swift.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback


class Recorder(TrainerCallback):
    """Keeps what a run saw beside its logs.

    ``gradients-<step>.pt``: each step's gradient, before clipping. ``seen.json``: the longest input of the student in tokens, on which
    sides its batches were padded, the largest dropout, how often the template's forward context was entered, how many parameters are
    spread over the ranks, what ZeRO-3 gathered, how often a vision tower, an audio tower and the lowest decoder layer ran, and at the end
    of each evaluation how often a teacher on the host has come. ``memory.json``: the bytes that the rank
    holds, by part, and those that were foretold.
    """

    foretold: dict[str, int] = {}

    def __init__(self, args, trainer):
        super().__init__()
        self.trainer = trainer
        self.seen = {'longest': 0, 'padded_left': False, 'padded_right': False, 'dropout': 0.0, 'forward_contexts': 0, 'sharded': 0}
        self.seen |= {'towers': 0, 'audio_towers': 0, 'lowest_layers': 0}
        self.held: dict[str, int] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        seen, template = self.seen, self.trainer.template
        seen['dropout'] = max((m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)), default=0.0)
        seen['sharded'] = sum(isinstance(p, DTensor) or getattr(p, 'ds_persist', True) is False for p in model.parameters())
        forward_context = template.forward_context

        def counted(*args):
            seen['forward_contexts'] += 1
            return forward_context(*args)

        def look(module, inputs):
            if model.training:
                seen['longest'] = max(seen['longest'], inputs[0].shape[1])
                pad = inputs[0] == template.tokenizer.pad_token_id
                seen['padded_left'] |= bool(pad[:, 0].any())
                seen['padded_right'] |= bool(pad[:, -1].any())

        def count(name):
            def add(*args):
                seen[name] += 1

            return add

        for name, module in model.named_modules():
            if name.endswith('visual.blocks.0.mlp'):
                module.register_forward_pre_hook(count('towers'))
            elif name.endswith('audio_tower.proj2'):
                module.register_forward_pre_hook(count('audio_towers'))
            elif name.endswith('layers.0.mlp'):
                module.register_forward_pre_hook(count('lowest_layers'))
        template.forward_context = counted
        model.get_input_embeddings().register_forward_pre_hook(look)
        if self.trainer.is_deepspeed_enabled:
            engine = self.trainer.model_wrapped
            step = engine.step

            def record_first():  # it steps inside the backward pass, before on_pre_optimizer_step
                zero = engine.optimizer
                flat = getattr(zero, 'grad_partitions_flat_buffer', None)
                parts = [flat] if flat is not None else [t for group in zero.averaged_gradients.values() for t in group or ()]
                self.held['gradients'] = local_bytes(parts)
                self.record()
                step()

            engine.step = record_first
            if hasattr(engine.optimizer, 'parameter_offload'):
                self.count_gathers(engine.optimizer.parameter_offload.get_param_coordinator())
            teacher = getattr(self.trainer.teacher_model, 'optimizer', None)
            if hasattr(teacher, 'get_param_coordinator'):
                self.count_gathers_of_teacher(teacher.get_param_coordinator())

    def count_gathers_of_teacher(self, coordinator):
        """How often its modules asked for a parameter under ZeRO-3."""
        gather = coordinator._PartitionedParameterCoordinator__all_gather_params_
        self.seen['gathered_of_teacher'] = 0

        def counted(params, *args, **kwargs):
            self.seen['gathered_of_teacher'] += sum(p.ds_status.name == 'NOT_AVAILABLE' for p in params)
            gather(params, *args, **kwargs)

        coordinator._PartitionedParameterCoordinator__all_gather_params_ = counted

    def count_gathers(self, coordinator):
        """ZeRO-3: parameters that a rank asked the others for, and how often it forgot the order of modules."""
        seen, student = self.seen, self.trainer.accelerator.unwrap_model(self.trainer.model)
        seen |= {'invalidated': 0, 'gathered': 0, 'heads_gathered': 0}
        gather, invalidate = coordinator._PartitionedParameterCoordinator__all_gather_params_, coordinator._invalidate_trace
        whole = {id(p) for name, p in student.named_parameters() if 'lm_head' in name}

        def counted(params, *args, **kwargs):
            missing = [p for p in params if p.ds_status.name == 'NOT_AVAILABLE']
            seen['gathered'] += sum(p.ds_numel for p in missing)
            seen['heads_gathered'] += any(id(p) in whole for p in missing)
            gather(params, *args, **kwargs)

        def forgot():
            seen['invalidated'] += 1
            invalidate()

        coordinator._PartitionedParameterCoordinator__all_gather_params_, coordinator._invalidate_trace = counted, forgot

    def on_evaluate(self, args, state, control, **kwargs):
        host_copy = getattr(self.trainer.teacher, 'host_copy', None)
        if host_copy is not None:
            self.seen.setdefault('visits', []).append(host_copy.moved / host_copy.bytes)

    def on_train_end(self, args, state, control, **kwargs):
        if args.process_index == 0:
            Path(args.output_dir, 'seen.json').write_text(json.dumps(self.seen))
            Path(args.output_dir, 'memory.json').write_text(json.dumps({'held': self.held | self.weighed(), 'foretold': self.foretold}))

    def weighed(self) -> dict[str, int]:
        trainer, found = self.trainer, {}
        found['student weights'] = model_bytes(trainer.accelerator.unwrap_model(trainer.model))
        if trainer.teacher_model is not None:
            found['teacher weights'] = model_bytes(trainer.teacher_model)
        rewarding = trainer.conductor.rewarding if hasattr(trainer, 'conductor') else None  # ms-swift's own have none
        if rewarding is not None and rewarding.rewards.models:
            found['reward model weights'] = sum(model_bytes(judge.model) for judge in rewarding.rewards.models)
        optimizer = trainer.optimizer
        while hasattr(optimizer, 'optimizer'):
            optimizer = optimizer.optimizer
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
        found['optimizer'] = local_bytes(states)
        if trainer.is_deepspeed_enabled:
            zero = trainer.model_wrapped.optimizer
            groups = getattr(zero, 'fp32_partitioned_groups_flat', None) or zero.single_partition_of_fp32_groups
            found['optimizer'] += local_bytes(groups)
        return found

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self.record()

    def record(self):
        trainer = self.trainer
        if not trainer.is_deepspeed_enabled:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            self.held['gradients'] = max(self.held.get('gradients', 0), local_bytes(grads))
        gradients = {}
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
            gradient = self.whole_gradient(p) if p.requires_grad else None
            if gradient is not None:
                gradients[name.replace('_checkpoint_wrapped_module.', '')] = gradient.detach().clone()
        if trainer.args.process_index == 0:
            torch.save(gradients, Path(trainer.args.output_dir) / f'gradients-{trainer.state.global_step + 1}.pt')

    def whole_gradient(self, p):
        """Of all ranks; every rank calls it."""
        if self.trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(p)
        return p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad


def local_bytes(tensors) -> int:
    """Of what this rank has of them."""
    parts = [getattr(t, 'ds_tensor', t) for t in tensors]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in parts)


def model_bytes(model) -> int:
    """Of what this rank has of a model; FSDP2 keeps a rank's piece of what it has gathered too."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    spread = [p for group in dict.fromkeys(groups) if group is not None for p in group.fsdp_params]
    if not spread:
        return local_bytes(model.parameters())
    return sum(p._sharded_param_data.nbytes + (p.unsharded_param.nbytes if p.sharded_state.name == 'UNSHARDED' else 0) for p in spread)


class StopAt(TrainerCallback):
    """Kills the run in the middle: an exception after the step that the environment variable names."""

    def __init__(self, args, trainer):
        super().__init__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ['STOP_AT']):
            raise KeyboardInterrupt


def allow_fsdp_on_cpu() -> None:
    """accelerate turns FSDP on for a list of accelerators (state.py, next to MULTI_GPU); torch's FSDP2 runs on gloo too."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    init = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state['distributed_type'] = DistributedType.FSDP
            if self._mixed_precision != 'no':
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


@contextmanager
def forced(job):
    """What a job asks for beside its options: ``dense``, whole logits for every model; ``evaluate_first``, before any training;
    ``nothing_shared``, teacher and student each do all of their work; ``card``, a card of so many bytes."""
    from swift_gkd_plugin.hf.head import OutputHead
    from swift_gkd_plugin.hf.shared_work import SharedWork
    from swift_gkd_plugin.hf.trainer import GKDTrainer
    from swift_gkd_plugin.memory.verdict import Card

    why_dense, train, shared, none = OutputHead._why_dense, GKDTrainer.train, SharedWork.__bool__, Card.of_this_rank

    def evaluate_and_train(self, *args, **kwargs):
        self.evaluation_loop(self.get_eval_dataloader(), 'before')  # evaluate() logs, which ms-swift can't before training
        return train(self, *args, **kwargs)

    if job.get('dense'):
        OutputHead._why_dense = lambda self: 'the test wants it'
    if job.get('evaluate_first'):
        GKDTrainer.train = evaluate_and_train
    if job.get('card'):
        Card.of_this_rank = lambda: Card('cuda:0', job['card'])
    if job.get('nothing_shared'):
        SharedWork.__bool__ = lambda self: False
    try:
        yield
    finally:
        OutputHead._why_dense, GKDTrainer.train, SharedWork.__bool__, Card.of_this_rank = why_dense, train, shared, none


class AdamByTorch:
    """What DeepSpeed's Adam on the host asks its extension for, by torch operations: the extension takes minutes to compile."""

    def create_adam(self, *options) -> None:
        """It has no state."""

    destroy_adam = create_adam

    def adam_update(self, number, step, lr, beta1, beta2, eps, decay, correct, p, gradient, mean, square) -> None:
        gradient = gradient.float()
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        of_mean, of_square = (1 - beta1**step, 1 - beta2**step) if correct else (1, 1)
        p.mul_(1 - lr * decay).sub_(lr * (mean / of_mean) / ((square / of_square).sqrt() + eps))


def keep_what_is_foretold() -> None:
    from swift_gkd_plugin.memory import verdict

    announce = verdict.announce

    def kept(setup, table, *rest):
        Recorder.foretold = {part.name: part.bytes for part in table(setup).parts if part.exact}
        announce(setup, table, *rest)

    verdict.announce = kept


def main(path: str) -> None:
    jobs = json.loads(Path(path).read_text())
    if 'RANK' in os.environ and any('--deepspeed' in job['argv'] for job in jobs):
        import deepspeed

        # All-reduce through shared memory, which would have to be compiled; gloo has one.
        deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False
        deepspeed.ops.adam.cpu_adam.CPUAdamBuilder.load = lambda self: AdamByTorch()
        deepspeed.init_distributed('gloo')  # before any model asks for ZeRO-3; it would pick a back end of its own
    if os.environ.get('SWIFT_GKD_PLUGIN') != '0':
        from swift_gkd_plugin import register

        register()
        keep_what_is_foretold()
    from swift.arguments import SftArguments
    from swift.callbacks import callbacks_map
    from swift.pipelines import rlhf_main

    def allow_sdpa(self):
        # ms-swift wants flash attention for packed rows, which has no CPU kernel. transformers' sdpa builds the same block-diagonal mask
        # from the position ids, slowly.
        self.padding_free = self.padding_free or self.packing

    SftArguments._check_padding_free = allow_sdpa
    allow_fsdp_on_cpu()
    loaded = []
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    def counted(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return from_pretrained(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(counted)
    callbacks_map['recorder'] = Recorder
    callbacks_map['stop_at'] = StopAt
    rank = int(os.environ.get('RANK', 0))
    for job in jobs:
        gc.collect()
        gc.freeze()  # accelerate collects garbage after each run, and would look through whatever has been imported
        os.environ['STOP_AT'] = str(job.get('stop_at', -1))
        error, trace = None, ''
        loaded.clear()
        try:
            with forced(job) if {'dense', 'evaluate_first', 'nothing_shared', 'card'} & job.keys() else nullcontext():
                rlhf_main(job['argv'])
        except BaseException as e:
            error = f'{type(e).__name__}: {e}'
            trace = traceback.format_exc()
            print(trace, flush=True)
        if rank == 0:
            Path(job['output_dir'], 'outcome.json').write_text(json.dumps({'error': error, 'loaded': len(loaded), 'traceback': trace}))


if __name__ == '__main__':
    main(sys.argv[1])
