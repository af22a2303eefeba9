"""Runs whose teacher has a layout of its own, and must not depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cases import CAPPED, LORA, make_datasets
from runs import Jobs, Run, run_jobs


def layout(tp=None, pp=None, cp=None, ep=None, etp=None) -> dict[str, int]:
    names = ('tensor_model', 'pipeline_model', 'context', 'expert_model', 'expert_tensor')
    sizes = zip(names, (tp, pp, cp, ep, etp), strict=True)
    return {f'teacher_{name}_parallel_size': size for name, size in sizes if size is not None}


# A large epsilon: see test_megatron_training.py.
STEPS = {'dataset': 'ten', 'train_iters': 3, 'adam_eps': 1e-3}
PRIVILEGED = {'dataset': 'privileged', 'micro_batch_size': 2}
WIDE, TIED = {'teacher_model': 'wide', 'beta': 0}, {'model': 'tied', 'teacher_model': 'wide'}
TOPK = {'gkd_logits_topk': 8, 'teacher_model': 'wide'}
MOE = {'model': 'moe', 'teacher_model': 'moe_teacher'}
PADDED = {'micro_batch_size': 2, 'padding_free': 'false'}
# Micro-batches that two replicas, or four, cannot share evenly.
THREE, SIX = {'global_batch_size': 3}, {'global_batch_size': 6}
EVALUATED = {**STEPS, 'val_dataset': 'privileged', 'eval_steps': 3, 'global_batch_size': 6}  # 8 rows
ANSWERS = {**STEPS, 'seq_kd': 'true', 'lmbda': 0, 'gkd_teacher_temperature': 0, 'gkd_teacher_max_completion_length': 6}
DP4 = {'tensor_model_parallel_size': 1, 'pipeline_model_parallel_size': 1}

# By the student's layout: what is trained, and the layout of the teacher.
PAIRS: dict[str, dict[str, tuple[dict, dict]]] = {
    'DP2': {
        'TP2, fillers': (STEPS, layout(tp=2)),
        'TP2, offloaded': ({**STEPS, 'gkd_teacher_offload': 'model', 'gkd_optimizer_offload': 'true'}, layout(tp=2)),
        'TP2, wide': (WIDE, layout(tp=2)),
        'TP2, top-k': ({**TOPK, 'nccl_comm_warmup': 'true'}, layout(tp=2)),
        'TP2, answers': (ANSWERS, layout(tp=2)),
        'TP2, evaluated': (EVALUATED, layout(tp=2)),
        'TP2, extrapolated, evaluated': ({**EVALUATED, **LORA, 'gkd_extrapolation': 1.5, 'gkd_teacher_offload': 'model'}, layout(tp=2)),
        'TP2, another family': ({'teacher_model': 'qwen2'}, layout(tp=2)),
        'PP2, soft caps': ({**PRIVILEGED, **CAPPED}, layout(pp=2)),
        'CP2': (PRIVILEGED, layout(cp=2)),
        'CP2, padded': (PADDED, layout(cp=2)),
        'EP2': (MOE, layout(ep=2)),
        'TP2, experts whole': (MOE, layout(tp=2)),
        'TP2, experts split': (MOE, layout(tp=2, etp=2)),
        'PP2, experts': (MOE, layout(pp=2)),
    },
    'TP2': {
        'DP2, filler': (THREE, layout(tp=1)),
        'DP2, tied student': (TIED, layout(tp=1)),
        'PP2, top-k': (TOPK, layout(tp=1, pp=2)),
        'CP2': (PRIVILEGED, layout(tp=1, cp=2)),
        'DP2, answers': (ANSWERS, layout(tp=1)),
        'DP2, evaluated': (EVALUATED, layout(tp=1)),
    },
    'PP2': {
        'DP2, filler': (THREE, layout(pp=1)),
        'TP2, wide': (WIDE, layout(tp=2, pp=1)),
        'EP2': (MOE, layout(pp=1, ep=2)),
    },
    'CP2': {
        'DP2, filler': (THREE, layout(cp=1)),
        'DP2': (PRIVILEGED, layout(cp=1)),
        'TP2': (PRIVILEGED, layout(tp=2, cp=1)),
        'EP2': (MOE, layout(ep=2)),
    },
    'EP2': {
        'EP1, adapters': (MOE | {'teacher_adapters': 'moe_teacher_adapter'}, layout(ep=1)),
        'TP2': (MOE, layout(tp=2, ep=1, etp=2)),
        'PP2, answers': (MOE | ANSWERS, layout(pp=2, ep=1)),
    },
    # The teacher has the student's virtual stages as long as it has its stages.
    'PP2xVPP2': {
        'VPP2': ({'teacher_model': 'wide'}, layout(tp=1)),
        'TP2, adapters': ({**STEPS, 'teacher_adapters': 'teacher_adapter'}, layout(tp=2, pp=1)),
    },
    'TP2xPP2': {
        'DP4, fillers': (SIX, layout(tp=1, pp=1)),
        'PP4': (WIDE, layout(tp=1, pp=4)),
        'TP2xCP2': (PRIVILEGED, layout(pp=1, cp=2)),
        'DP2xPP2, tied student': (TIED, layout(tp=1)),
    },
    'TP2xCP2': {'EP4': (MOE, layout(tp=1, cp=1, ep=4)), 'PP2': (PRIVILEGED, layout(pp=2, cp=1))},
    'DP4': {
        'TP2xDP2': ({**STEPS, **WIDE}, layout(tp=2)),
        'EP2, answers': (MOE | ANSWERS, layout(ep=2)),
        'TP2xPP2': (PRIVILEGED | {'global_batch_size': 8}, layout(tp=2, pp=2)),
    },
}


def run_in(student: str, jobs: Jobs, root: Path, models: Mapping[str, Path], train: Path) -> dict[str, Run]:
    """Run jobs with a layout of the student, a key of PAIRS or of runs.LAYOUTS."""
    root.mkdir(parents=True, exist_ok=True)
    datasets = make_datasets(train, root)
    jobs = {name: {key: datasets[value] if key.endswith('dataset') else value for key, value in job.items()} for name, job in jobs.items()}
    if student == 'DP4':  # four ranks of any kind
        student, jobs = 'TP2xPP2', {name: {**DP4, **job} for name, job in jobs.items()}
    return {name: run.ok() for name, run in run_jobs(jobs, student, root, models, train, timeout=600).items()}


def run_pairs(student: str, root: Path, models: Mapping[str, Path], train: Path) -> dict[str, Run]:
    return run_in(student, {name: {**trained, **own} for name, (trained, own) in PAIRS[student].items()}, root, models, train)


def run_alone(root: Path, models: Mapping[str, Path], train: Path) -> dict[str, dict[str, Run]]:
    """The run with one process that each of PAIRS is held against."""
    trained = {student: {name: job for name, (job, _) in pairs.items()} for student, pairs in PAIRS.items()}
    different = {repr(job): job for jobs in trained.values() for job in jobs.values()}
    runs = run_in('1', {str(n): job for n, job in enumerate(different.values())}, root, models, train)
    found = dict(zip(different, runs.values(), strict=True))
    return {student: {name: found[repr(job)] for name, job in jobs.items()} for student, jobs in trained.items()}
