"""The configurations. Another one is one more entry of ``MATRIX``; what it is compared with has to stand above it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from judging import (
    STEPS,
    Check,
    engine_sleeps,
    few_batches_of_the_teacher,
    frugal,
    moves_the_optimizer,
    moves_the_teacher,
    runs_ahead,
    spares_half_the_teacher,
    student_answers,
    teacher_answers,
    teaches_nothing,
    uses_two_devices,
)

ROWS_PER_STEP = 16
MICRO_BATCH = 2
HERE = Path(__file__).resolve().parent


class Made(str):
    """A name in the directory that inputs.py fills."""


@dataclass(frozen=True)
class Configuration:
    """A command line and what it has to show.

    Attributes:
        name: Of its line, and of its directory.
        options: On top of those of all configurations; None leaves an option out.
        gpus: That it needs, a server's included.
        like: The configuration with the same losses.
        within: Their relative difference on GPUs, where it is more than that of the dtypes.
        checks: What else is asked of it, see judging.py.
        command: ``swift`` or ``megatron``.
        dtype: ``float32``, ``bfloat16``, or ``mixed``: weights in fp32, products in bf16.
        needs: Packages that have to be installed.
        one_process: It sees all its GPUs from one process.
        server: A command that runs beside it on the last GPU; ``{port}`` is where it listens.
        env: More environment variables.
        capability: CUDA's compute capability that it needs.
        not_on_cpu: Why there is none without GPUs; None if there is.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 1
    like: Optional[str] = None
    within: Optional[float] = None
    checks: tuple[Check, ...] = ()
    command: str = 'swift'
    dtype: str = 'float32'
    needs: tuple[str, ...] = ()
    one_process: bool = False
    server: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    capability: float = 0
    not_on_cpu: Optional[str] = None

    @property
    def least_capability(self) -> float:
        return max(self.capability, 0 if self.dtype == 'float32' else 8.0)

    @property
    def ranks(self) -> int:
        return 1 if self.one_process else self.gpus - bool(self.server)

    @property
    def torchrun(self) -> bool:
        """Megatron-SWIFT and an engine in the training processes want a rank of their own also where there is one."""
        return self.ranks > 1 or self.command == 'megatron' or self.options.get('vllm_mode') == 'colocate'


# --- options that several of them have ---

TUNED = {
    'tuner_type': 'lora',
    'adapters': Made('adapter'),
    'target_modules': 'all-linear',
    'lora_rank': 8,
    'lora_alpha': 16,
    'lora_dropout': 0,
}
PRIVILEGED_BASE = {**TUNED, 'dataset': Made('privileged.jsonl'), 'teacher_model': Made('student')}
MOE = {'model': Made('moe'), 'model_type': 'qwen3_moe', 'teacher_model': Made('moe_teacher'), 'teacher_model_type': 'qwen3_moe'}
# Teacher and student see one row at a time: in bf16 another batch would be rounded otherwise, which is as much as what this is to find,
# logits of one of them that were rounded before the softmax.
OWN_COPY = {'teacher_model': Made('copy'), 'gkd_logits_topk': 16, 'beta': 0, 'gkd_teacher_batch_size': 1}
GREEDY = {'temperature': 0, 'gkd_temperature': 1}
TEACHER_ANSWERS = {**GREEDY, 'seq_kd': 'true', 'gkd_logits_topk': 16}
STUDENT_ANSWERS = {'lmbda': 1, 'top_k': -1}
DEEP = {'teacher_model': Made('deep_teacher')}
EVALUATED = {'val_dataset': Made('validation.jsonl'), 'eval_strategy': 'steps', 'eval_steps': 1, 'per_device_eval_batch_size': 2}

# An engine has six tenths of a GPU, and beside some of them the training processes reserve half of it: they do not fit together.
ENGINE = '--max-model-len 256 --enforce-eager {engine_memory}'
TEACHER_ENGINE = {'gkd_teacher_engine': 'vllm', 'gkd_teacher_engine_args': ENGINE}
OF_MS_SWIFT = {'vllm_max_model_len': 256, 'vllm_enforce_eager': 'true', 'vllm_gpu_memory_utilization': 0.6}
COLOCATED = {**STUDENT_ANSWERS, **GREEDY, **OF_MS_SWIFT, 'use_vllm': 'true', 'vllm_mode': 'colocate', 'sleep_level': 1}
EXCHANGED = {'offload_model': 'true', 'offload_optimizer': 'true'}
VLLM_ON_A_SERVER = {
    'use_vllm': 'true',
    'vllm_mode': 'server',
    'vllm_server_host': '127.0.0.1',
    'vllm_server_port': '{port}',
    'vllm_server_group_port': '{group_port}',
}
ROLLOUT = (
    *('swift', 'rollout', '--model', Made('student'), '--model_type', 'qwen3', '--template', 'chatml', '--torch_dtype', 'bfloat16'),
    *('--host', '127.0.0.1', '--port', '{port}', '--vllm_max_model_len', '256', '--vllm_enforce_eager', 'true'),
)
SERVED_TEACHER = (
    *(sys.executable, '-m', 'vllm.entrypoints.openai.api_server', '--model', Made('teacher'), '--served-model-name', 'teacher'),
    *('--dtype', '{dtype}', '--max-logprobs', '16', '--host', '127.0.0.1', '--port', '{port}', *ENGINE.split()),
)

MEGATRON_PACKAGES = ('megatron.core', 'mcore_bridge')
DISTRIBUTED_OPTIMIZER = {'use_distributed_optimizer': 'true', 'overlap_grad_reduce': 'true', 'overlap_param_gather': 'true'}
# The auxiliary loss is one per micro-batch: these are the same in all layouts if a micro-batch is one row.
BALANCED = {**MOE, 'moe_aux_loss_coeff': 0.1, 'micro_batch_size': 1, 'padding_free': 'false'}


def megatron(name: str, layout: Mapping[str, int] | None = None, options: Mapping[str, Any] | None = None, **how) -> Configuration:
    """A configuration of ``megatron rlhf``.

    Args:
        layout: Sizes by the short names of the axes.
    """
    axes = {'TP': 'tensor_model', 'PP': 'pipeline_model', 'VPP': 'virtual_pipeline_model', 'CP': 'context', 'EP': 'expert_model'}
    split = {f'{axes[axis]}_parallel_size': size for axis, size in (layout or {}).items()}
    return Configuration(
        name, {**split, **(options or {})}, command='megatron', dtype='bfloat16', **{'needs': MEGATRON_PACKAGES, 'like': 'Megatron', **how}
    )


# --- the table ---

NEEDS_SEVERAL_DEVICES = 'one process with several devices'
SLEEPS_ON_GPUS_ONLY = "without a GPU an engine of ms-swift's neither starts nor sleeps"

MATRIX = (
    # The weights of the student over ranks.
    Configuration('one GPU'),
    Configuration('DDP', gpus=2, like='one GPU'),
    Configuration('ZeRO-2', {'deepspeed': 'zero2'}, gpus=2, like='one GPU', needs=('deepspeed',)),
    Configuration('ZeRO-3', {'deepspeed': 'zero3'}, gpus=2, like='one GPU', needs=('deepspeed',)),
    Configuration('FSDP2', {'fsdp': 'fsdp2'}, gpus=2, like='one GPU', not_on_cpu='accelerate has FSDP for accelerators'),
    Configuration('tied head', {'model': Made('tied')}),
    Configuration(
        'tied head over two devices',
        {'model': Made('tied'), 'device_map': 'auto', 'teacher_device_map': 'auto'},
        gpus=2,
        like='tied head',
        checks=(uses_two_devices,),
        one_process=True,
        not_on_cpu=NEEDS_SEVERAL_DEVICES,
    ),
    # Other products than in fp32.
    Configuration('bf16', like='one GPU', dtype='bfloat16'),
    Configuration('fp32 weights under AMP', like='one GPU', dtype='mixed'),
    Configuration(
        'FSDP2 under AMP',
        {'fsdp': 'fsdp2'},
        gpus=2,
        like='one GPU',
        dtype='mixed',
        not_on_cpu='accelerate has FSDP for accelerators',
    ),
    Configuration('torch.compile', {'torch_compile': 'true'}, like='one GPU', not_on_cpu="inductor's kernels would be others"),
    Configuration('own copy as teacher, bf16', {**OWN_COPY, 'per_device_train_batch_size': 1}, checks=(teaches_nothing,), dtype='bfloat16'),
    # Who answers.
    Configuration('student answers', STUDENT_ANSWERS, checks=(student_answers,)),
    Configuration('student answers, DDP', STUDENT_ANSWERS, gpus=2, like='student answers', checks=(student_answers,)),
    Configuration(
        'student answers, ZeRO-3',
        {**STUDENT_ANSWERS, 'deepspeed': 'zero3'},
        gpus=2,
        like='student answers',
        checks=(student_answers,),
        needs=('deepspeed',),
    ),
    Configuration('student answers greedily', {**STUDENT_ANSWERS, **GREEDY}, checks=(student_answers,)),
    Configuration('teacher answers', TEACHER_ANSWERS, checks=(teacher_answers,)),
    # Where the teacher is.
    Configuration(
        'ZeRO-3 teacher of a ZeRO-2 student',
        {'deepspeed': 'zero2', 'teacher_deepspeed': 'zero3'},
        gpus=2,
        like='one GPU',
        checks=(few_batches_of_the_teacher,),
        needs=('deepspeed',),
    ),
    Configuration(
        'ZeRO-3 teacher of a ZeRO-2 student answers',
        {**TEACHER_ANSWERS, 'deepspeed': 'zero2', 'teacher_deepspeed': 'zero3'},
        gpus=2,
        like='teacher answers',
        checks=(teacher_answers,),
        needs=('deepspeed',),
    ),
    Configuration('deep teacher', {**DEEP, **EVALUATED}, gpus=2),
    Configuration(
        'deep teacher on the host',
        {**DEEP, **EVALUATED, 'gkd_teacher_offload': 'model'},
        gpus=2,
        like='deep teacher',
        checks=(moves_the_teacher, frugal),
    ),
    Configuration(
        'deep teacher on the host, by layers',
        {**DEEP, **EVALUATED, 'gkd_teacher_offload': 'layer'},
        gpus=2,
        like='deep teacher',
        checks=(moves_the_teacher, spares_half_the_teacher),
    ),
    Configuration(
        'deep teacher over two devices',
        {**DEEP, **EVALUATED, 'device_map': 'auto', 'teacher_device_map': 'auto', 'teacher_max_memory': '{0: "100MB", 1: "1GB"}'},
        gpus=2,
        like='deep teacher',
        checks=(uses_two_devices,),
        one_process=True,
        not_on_cpu=NEEDS_SEVERAL_DEVICES,
    ),
    Configuration('shared base', PRIVILEGED_BASE),
    Configuration('shared base, ZeRO-3', {**PRIVILEGED_BASE, 'deepspeed': 'zero3'}, gpus=2, like='shared base', needs=('deepspeed',)),
    # Engines. `reserve`: torch's allocator has half of the GPU after each step, as with a large model.
    Configuration(
        "teacher's engine over three steps",
        {**TEACHER_ANSWERS, **TEACHER_ENGINE, 'callbacks': 'reserve'},
        gpus=2,
        like='teacher answers',
        within=0.2,
        checks=(teacher_answers, engine_sleeps),
        dtype='bfloat16',
        needs=('vllm',),
    ),
    Configuration(
        "teacher's engine, expandable segments",
        {**TEACHER_ANSWERS, **TEACHER_ENGINE},
        like='teacher answers',
        within=0.2,
        checks=(teacher_answers, engine_sleeps),
        dtype='bfloat16',
        needs=('vllm',),
        env={'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True'},
        not_on_cpu="these are segments of CUDA's",
    ),
    Configuration(
        "teacher's server",
        {**TEACHER_ANSWERS, 'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': 'http://127.0.0.1:{port}'},
        gpus=2,
        like='teacher answers',
        within=0.2,
        checks=(teacher_answers,),
        dtype='bfloat16',
        needs=('vllm',),
        server=SERVED_TEACHER,
    ),
    Configuration(
        'colocated vLLM, asleep in between',
        {**COLOCATED, **EXCHANGED, 'callbacks': 'reserve'},
        gpus=2,
        like='student answers greedily',
        within=0.2,
        checks=(student_answers, engine_sleeps),
        dtype='bfloat16',
        needs=('vllm',),
        not_on_cpu=SLEEPS_ON_GPUS_ONLY,
    ),
    Configuration(
        'colocated vLLM, adapter alone',
        {**COLOCATED, **EXCHANGED, **TUNED, 'vllm_enable_lora': 'true'},
        checks=(student_answers, engine_sleeps),
        dtype='bfloat16',
        needs=('vllm',),
        not_on_cpu=SLEEPS_ON_GPUS_ONLY,
    ),
    Configuration(
        'vLLM on a server, one step ahead',
        {**STUDENT_ANSWERS, **GREEDY, **VLLM_ON_A_SERVER, 'gkd_prefetch': 'true', 'log_completions': 'true'},
        gpus=2,
        like='student answers greedily',
        within=0.5,  # its answers are one update old
        checks=(student_answers, runs_ahead),
        dtype='bfloat16',
        needs=('vllm',),
        server=ROLLOUT,
        not_on_cpu='weights go to the server by NCCL',
    ),
    # Megatron, one axis at a time and then together.
    megatron('Megatron', like='one GPU'),
    megatron('TP 2', {'TP': 2}, gpus=2),
    megatron('TP 2, sequence parallel', {'TP': 2}, {'sequence_parallel': 'true'}, gpus=2),
    megatron('PP 2', {'PP': 2}, gpus=2),
    megatron('PP 2, virtual stages', {'PP': 2, 'VPP': 2}, gpus=2),
    megatron('CP 2', {'CP': 2}, gpus=2),
    megatron('DP 2, distributed optimizer', None, DISTRIBUTED_OPTIMIZER, gpus=2),
    megatron('TP 2 x PP 2', {'TP': 2, 'PP': 2}, gpus=4),
    megatron('TP 2 x PP 2, virtual stages', {'TP': 2, 'PP': 2, 'VPP': 2}, gpus=4),
    megatron('PP 2 x CP 2', {'PP': 2, 'CP': 2}, gpus=4),
    megatron('TP 2 x CP 2', {'TP': 2, 'CP': 2}, {'sequence_parallel': 'true'}, gpus=4),
    megatron('TP 2 x PP 2 x DP 2', {'TP': 2, 'PP': 2}, {**DISTRIBUTED_OPTIMIZER, 'sequence_parallel': 'true'}, gpus=8),
    megatron('wider teacher', None, {'teacher_model': Made('wider_teacher')}, like=None),
    megatron('wider teacher, TP 2', {'TP': 2}, {'teacher_model': Made('wider_teacher')}, gpus=2, like='wider teacher'),
    megatron(
        'own copy as teacher, TP 2',
        {'TP': 2},
        {**OWN_COPY, 'micro_batch_size': 1},
        gpus=2,
        like=None,
        checks=(teaches_nothing,),
    ),
    megatron('MoE', None, BALANCED, like=None),
    megatron('EP 2', {'EP': 2}, BALANCED, gpus=2, like='MoE'),
    megatron(
        'experts over TP 2',
        {'TP': 2},
        {**BALANCED, 'sequence_parallel': 'true', 'expert_tensor_parallel_size': 2},
        gpus=2,
        like='MoE',
    ),
    megatron('EP 2 x PP 2', {'EP': 2, 'PP': 2}, BALANCED, gpus=4, like='MoE'),
    megatron('EP 2 x DP 2, distributed optimizer', {'EP': 2}, {**BALANCED, **DISTRIBUTED_OPTIMIZER}, gpus=4, like='MoE'),
    megatron('teacher at TP 2, student at DP 2', None, {'teacher_tensor_model_parallel_size': 2}, gpus=2),
    megatron(
        'teacher at TP 2 x PP 2, student at DP 4',
        None,
        {'teacher_tensor_model_parallel_size': 2, 'teacher_pipeline_model_parallel_size': 2},
        gpus=4,
    ),
    megatron('deep teacher, TP 2', {'TP': 2}, DEEP, gpus=2, like=None),
    megatron(
        'deep teacher on the host, TP 2',
        {'TP': 2},
        {**DEEP, 'offload_teacher_model': 'true', 'gkd_optimizer_offload': 'true'},
        gpus=2,
        like='deep teacher, TP 2',
        checks=(moves_the_teacher, moves_the_optimizer, frugal),
    ),
    megatron(
        'student answers, TP 2',
        {'TP': 2},
        {**STUDENT_ANSWERS, **GREEDY},
        gpus=2,
        like='student answers greedily',
        within=0.2,
        checks=(student_answers,),
    ),
    megatron(
        "teacher's engine over TP 2",
        {'TP': 2},
        {**TEACHER_ANSWERS, **TEACHER_ENGINE, 'gkd_teacher_engine_args': f'{ENGINE} --tensor-parallel-size 2'},
        gpus=2,
        like='teacher answers',
        within=0.2,
        checks=(teacher_answers, engine_sleeps),
        needs=(*MEGATRON_PACKAGES, 'vllm'),
        not_on_cpu='one engine on two devices',
    ),
    megatron(
        'colocated vLLM, TP 2',
        {'TP': 2},
        {**COLOCATED, **EXCHANGED},
        gpus=2,
        like='student answers greedily',
        within=0.2,
        checks=(student_answers, engine_sleeps),
        needs=(*MEGATRON_PACKAGES, 'vllm'),
        not_on_cpu=SLEEPS_ON_GPUS_ONLY,
    ),
    megatron(
        'fp8 student, teacher at TP 2',
        None,
        {'fp8_format': 'hybrid', 'fp8_recipe': 'delayed', 'teacher_tensor_model_parallel_size': 2},
        gpus=2,
        within=0.2,
        capability=8.9,
        not_on_cpu="the products of 8 bits are a GPU's",
    ),
)

# --- command lines ---

OF_BOTH = {
    'rlhf_type': 'gkd',
    'model': Made('student'),
    'model_type': 'qwen3',
    'template': 'chatml',
    'teacher_model': Made('teacher'),
    'teacher_model_type': 'qwen3',
    'dataset': Made('rows.jsonl'),
    'external_plugins': HERE / 'in_each_rank.py',
    'tuner_type': 'full',
    'max_length': 128,
    'max_completion_length': 16,
    'lmbda': 0,
    'beta': 0.5,
    'temperature': 1,
    'logging_steps': 1,
    'train_dataloader_shuffle': 'false',
    'dataset_shuffle': 'false',
    'split_dataset_ratio': 0,
    'dataset_num_proc': 1,
    'load_from_cache_file': 'false',
    'check_model': 'false',  # needs a network
    'add_version': 'false',
}
# An epsilon that keeps Adam from turning the rounding of gradients near zero into whole steps.
OF_SWIFT = {
    'max_steps': STEPS,
    'per_device_train_batch_size': MICRO_BATCH,
    'learning_rate': 1e-3,
    'lr_scheduler_type': 'constant',
    'warmup_ratio': 0,
    'optim': 'adamw_torch',
    'adam_epsilon': 1e-3,
    'gradient_checkpointing': 'false',
    'save_strategy': 'no',
    'eval_strategy': 'no',
    'report_to': 'none',
}
OF_MEGATRON = {
    'train_iters': STEPS,
    'micro_batch_size': MICRO_BATCH,
    'global_batch_size': ROWS_PER_STEP,
    'lr': 1e-3,
    'lr_decay_style': 'constant',
    'lr_warmup_fraction': 0,
    'adam_eps': 1e-3,
    'recompute_granularity': 'none',
    'attention_backend': 'auto',  # whichever Transformer Engine has here
    'report_to': 'no_checkpoint',
    'use_vllm': 'false',
}
OF_DTYPE = {
    'float32': {'torch_dtype': 'float32', 'bf16': 'false', 'fp16': 'false'},
    'bfloat16': {'torch_dtype': 'bfloat16', 'bf16': 'true', 'fp16': 'false'},
    'mixed': {'torch_dtype': 'float32', 'bf16': 'true', 'fp16': 'false'},
}
ENGINE_MEMORY = {True: '--gpu-memory-utilization=0.6', False: '--kv-cache-memory-bytes=67108864'}  # on GPUs, and without
ON_CPU = {'swift': {'use_cpu': 'true'}, 'megatron': {'bias_dropout_fusion': 'false'}}


def dtype_of(configuration: Configuration, on_gpus: bool) -> str:
    """Without GPUs megatron-core and vLLM compute in fp32, where layouts can be told apart from rounding."""
    return 'float32' if not on_gpus and configuration.needs else configuration.dtype


def arguments(configuration: Configuration, on_gpus: bool) -> dict[str, Any]:
    """Of the command, but for the output directory; what was made and ports are not filled in."""
    options = {**OF_BOTH, **OF_DTYPE[dtype_of(configuration, on_gpus)]}
    if configuration.command == 'swift':
        options |= {**OF_SWIFT, 'gradient_accumulation_steps': ROWS_PER_STEP // (MICRO_BATCH * configuration.ranks)}
    else:
        options |= OF_MEGATRON
    if not on_gpus:
        options |= ON_CPU[configuration.command]
        options |= {'ddp_backend': 'gloo'} if configuration.torchrun else {}
    return options | configuration.options


def words(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (f'--{name}', value)]


def readable(configuration: Configuration, on_gpus: bool) -> str:
    """As somebody would type it, the options of all configurations left out."""
    line = [configuration.command, 'rlhf', *words(configuration.options)]
    return shlex.join(map(str, line))
