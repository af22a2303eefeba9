"""Weights, gradients and optimizer spread over two ranks (gloo on loopback, fp32), against whole logits in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import job_runs
import pytest
import swift
import torch
from helpers import seed_with_shares, write_rows
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.timeout(1800)  # the first test waits for the runs of all layouts

STEP = {
    'max_steps': 2,
    'optim': 'sgd',
    'learning_rate': 0.01,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
    'lmbda': 0,
    'sft_alpha': 0.3,
    'tuner_type': 'full',
    'train_dataloader_shuffle': 'false',
    'dataset_shuffle': 'false',
}
ONE_PROCESS = {'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 2}
TWO_PROCESSES = {'per_device_train_batch_size': 1, 'gradient_accumulation_steps': 2}
MOVING = {'teacher_model': None, 'teacher_model_type': None, 'gkd_self_teacher': 'ema', 'gkd_ema_decay': 0.5}

CASES = (
    'separate',
    'checkpointing',
    'padding_free',
    'topk',
    'dense',
    'live',
    'live lora',
    'tied',
    'tied lora',
    'shared base',
    'modules_to_save',
    'lora on head',
    'last layer',
    'previous',
    'extrapolated',
    'extrapolated head',
    'dora',
    'experts',
    'routed',
    'average',
    'average lora',
    'average head',
    'average topk',
)
LAYOUTS = {
    'ddp': (
        'separate',
        'checkpointing',
        'padding_free',
        'live lora',
        'tied',
        'modules_to_save',
        'last layer',
        'previous',
        'dora',
        'experts',
        'routed',
        'on host',
        'average',
        'average lora',
    ),
    'zero2': (
        'separate',
        'checkpointing',
        'tied',
        'shared base',
        'modules_to_save',
        'last layer',
        'previous',
        'routed',
        'on host',
        'average',
    ),
    'zero3': (*CASES, 'on host'),
    'zero3 offload': ('shared base', 'modules_to_save', 'average lora'),
    'fsdp2': CASES,
}
# Settings of ZeRO-3 that leave no place to exchange parameters in.
NOT_AVERAGED = {
    'offload_param on nvme': {'offload_param': {'device': 'nvme', 'nvme_path': '.'}},
    'zero_hpz_partition_size 2': {'zero_hpz_partition_size': 2},
}
# Gradient checkpointing, packed rows, a teacher on the host and whole logits change nothing.
SAME_AS = {'checkpointing': 'separate', 'padding_free': 'separate', 'on host': 'separate', 'dense': 'topk'}


@pytest.fixture(scope='module')
def files(tiny_models, tmp_path_factory):
    """A dataset with teacher_prompt, a student with tied embeddings and configurations of FSDP2."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp('sharded')
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    for row in rows:
        row['teacher_prompt'] = f'The answer is: {row["messages"][1]["content"]} Now, {row["messages"][0]["content"]}'
    tied = root / 'tied'
    shutil.copytree(tiny_models.student, tied)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tied, tie_word_embeddings=True)).save_pretrained(tied)
    fsdp = {'fsdp': 'full_shard auto_wrap', 'fsdp_config': {'fsdp_version': 2, 'auto_wrap_policy': 'TRANSFORMER_BASED_WRAP'}}
    fsdp['fsdp_config'] |= {'activation_checkpointing': False, 'state_dict_type': 'FULL_STATE_DICT'}
    (root / 'fsdp.json').write_text(json.dumps(fsdp))
    # ms-swift's own, parameters and optimizer on the host, for the SGD of these tests instead of DeepSpeed's Adam.
    offload = json.loads((Path(swift.__file__).parent / 'config' / 'zero3_offload.json').read_text())
    (root / 'offload.json').write_text(json.dumps({**offload, 'zero_force_ds_cpu_optimizer': False}))
    # A tiny model's parameters would stay once they have been gathered.
    limits = ('param_persistence_threshold', 'max_reuse_distance', 'max_live_parameters', 'prefetch_bucket_size')
    zero = {'stage': 3, **{f'stage3_{name}': 0 for name in limits}}
    (root / 'forgetful.json').write_text(json.dumps({**offload, 'zero_optimization': zero}))
    found = {'privileged': write_rows(root / 'privileged.jsonl', rows), 'tied': tied}
    return found | {name: root / f'{name}.json' for name in ('fsdp', 'offload', 'forgetful')}


# Its epsilon keeps Adam from turning the rounding of gradients near zero into whole steps.
ADAM = {'optim': 'adamw_torch', 'adam_epsilon': 1e-3, 'learning_rate': 0.05, 'max_steps': 4}
ADAPTERS = {
    'lora': {},
    'modules_to_save': {'modules_to_save': 'lm_head'},
    'lora on head': {'target_modules': ['q_proj', 'lm_head']},
    'last layer': {'target_modules': ['layers.1.self_attn.q_proj', 'layers.1.mlp.up_proj']},
    'dora': {'use_dora': 'true'},
}


@pytest.fixture(scope='module')
def adapters(run_jobs, files, moe):
    """Adapters that are not the zero that a fresh one is, and whose random numbers every layout shares."""
    options = {'tuner_type': 'lora', 'lora_dropout': 0, 'learning_rate': 1.0, 'max_steps': 1, 'save_strategy': 'steps', 'save_steps': 1}
    jobs = {name: {**STEP, **ONE_PROCESS, **options, **kind} for name, kind in ADAPTERS.items()}
    jobs['tied'] = {**jobs['lora'], 'model': files['tied']}
    jobs['experts'] = {
        **jobs['lora'],
        'model': moe,
        'model_type': 'qwen3_moe',
        'target_modules': 'q_proj',
        'target_parameters': job_runs.EXPERTS,
    }
    found = {name: run.ok().output_dir / 'checkpoint-1' for name, run in run_jobs(jobs).items()}
    # PEFT saves the frozen head beside its LoRA, and can't load that into ZeRO-3's empty tensors.
    weights = found['lora on head'] / 'adapter_model.safetensors'
    save_file({name: tensor for name, tensor in load_file(weights).items() if 'base_layer' not in name}, weights)
    return found


@pytest.fixture(scope='module')
def cases(tiny_models, files, moe, adapters):
    none = {'teacher_model': None, 'teacher_model_type': None}
    privileged = {'dataset': files['privileged']}
    same = {'tuner_type': 'lora', 'teacher_model': tiny_models.student, **privileged}
    experts = {**same, 'model': moe, 'teacher_model': moe, 'adapters': adapters['experts']}
    experts |= {'model_type': 'qwen3_moe', 'teacher_model_type': 'qwen3_moe'}
    average = {**privileged, **MOVING}
    return {
        'separate': {},
        'checkpointing': {'gradient_checkpointing': 'true'},
        'padding_free': {'padding_free': 'true', 'attn_impl': 'sdpa', 'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 1},
        'on host': {'gkd_teacher_offload': 'model'},
        'topk': {'gkd_logits_topk': 8},
        'dense': {'gkd_logits_topk': 8, 'dense': True},
        'live': {**none, **privileged},
        'live lora': {**none, **privileged, 'tuner_type': 'lora', 'adapters': adapters['lora']},
        'tied': {**none, **privileged, 'model': files['tied'], 'gradient_checkpointing': 'true'},
        'tied lora': {**same, 'model': files['tied'], 'teacher_model': files['tied'], 'adapters': adapters['tied']},
        'shared base': {**same, 'adapters': adapters['lora'], 'gradient_checkpointing': 'true'},
        'modules_to_save': {**same, 'adapters': adapters['modules_to_save']},
        'lora on head': {**same, 'adapters': adapters['lora on head']},
        # Teacher and student share the work of the first layer.
        'last layer': {'tuner_type': 'lora', 'teacher_model': tiny_models.student, 'adapters': adapters['last layer']},
        # The teacher has an adapter of its own on the base.
        'previous': {**same, 'adapters': adapters['lora'], 'teacher_adapters': adapters['last layer']},
        # Three forwards through one model, of which the last two see the same; and two readers of one head that is not the student's.
        'extrapolated': {
            **{**same, 'adapters': adapters['last layer'], 'teacher_adapters': adapters['lora'], 'gkd_extrapolation': 1.5},
            'gradient_checkpointing': 'true',
        },
        'extrapolated head': {
            **{**same, 'adapters': adapters['modules_to_save'], 'teacher_adapters': adapters['last layer'], 'gkd_extrapolation': 1.5}
        },
        'dora': {**same, 'adapters': adapters['dora']},
        'experts': experts,
        'routed': {**experts, 'dataset': tiny_models.train, 'gkd_routing': 'teacher'},
        'average': average,
        'average lora': {**average, 'tuner_type': 'lora', 'adapters': adapters['lora']},
        'average head': {**average, 'tuner_type': 'lora', 'adapters': adapters['modules_to_save']},
        'average topk': {**average, 'gkd_logits_topk': 8},
    }


@pytest.fixture(scope='module')
def generating(files, adapters, tiny_models, judges):
    """Runs whose responses are generated; in 'few' rank 0 has nothing to generate at first, then rank 1; in 'judged' these are scored."""
    mixed = {'lmbda': 0.5, 'seq_kd': 'true', 'log_completions': 'true'}
    shared = {'tuner_type': 'lora', 'teacher_model': tiny_models.student, 'adapters': adapters['lora'], 'dataset': files['privileged']}
    saving = {'optim': 'adamw_torch', 'save_strategy': 'steps', 'save_steps': 1, 'eval_strategy': 'steps', 'eval_steps': 1}
    saving |= {'val_dataset': f'{tiny_models.val}#6', 'per_device_eval_batch_size': 2, 'gkd_eval_source': 'student'}
    few = {**mixed, 'seq_kd': 'false', 'lmbda': 0.3, 'seed': seed_with_shares([[0, 2], [1, 0]], 2, 0.3)}
    judge = {'reward_model': judges['judge'], 'reward_model_type': 'qwen3', 'reward_template': 'qwen3', 'gkd_rl_weight': 0}
    return {
        'generated': mixed,
        'few': few,
        'judged': {**few, **judge},
        'generated shared': {**mixed, **shared},
        'saved': {**mixed, **saving},
        'saved lora': {**mixed, **shared, **saving},
        # The average answers, teaches, and is part of the checkpoints.
        'saved average': {**mixed, **shared, **saving, **MOVING, 'seq_kd': 'true', 'lmbda': 0},
    }


@pytest.fixture(scope='module')
def one_process(run_jobs, cases, generating):
    dense = {name: {**STEP, **options, **ONE_PROCESS, 'dense': True} for name, options in cases.items() if name not in SAME_AS}
    others = {**generating, 'adam': {**cases['shared base'], **ADAM}}
    return run_jobs(dense | {name: {**STEP, **ONE_PROCESS, **options} for name, options in others.items()})


@pytest.fixture(scope='module')
def layouts(run_jobs, cases, generating, files, tiny_models, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp('layouts')

    def jobs(layout, how):
        two = {**STEP, **TWO_PROCESSES}
        found = {f'{layout} {name}': {**two, **options, **how(name)} for name, options in cases.items() if name in LAYOUTS[layout]}
        if layout in ('zero3', 'fsdp2'):
            for name, options in generating.items():
                directory = root / f'{layout} {name}'
                waves = {'gkd_generation_tokens': 1} if name == 'few' else {}  # one row at a time
                found[f'{layout} {name}'] = {**two, **options, **how(name), **waves, 'output_dir': directory}
                if name.startswith('saved'):
                    resume = {'output_dir': root / f'{layout} {name} resumed', 'resume_from_checkpoint': directory / 'checkpoint-1'}
                    found[f'{layout} {name} resumed'] = {**found[f'{layout} {name}'], **resume}
        return found

    # Jobs of one process share its environment, in which ms-swift leaves FSDP on.
    plain = jobs('ddp', lambda name: {})
    # The configuration of ms-swift's own name checkpoints activations and saves shards.
    plain |= jobs('fsdp2', lambda name: {'fsdp': 'fsdp2' if name in ('checkpointing', 'shared base', 'saved') else files['fsdp']})
    for name in ('generated', 'generated shared', 'saved average'):
        plain[f'fsdp2 {name} first'] = {**plain[f'fsdp2 {name}'], 'evaluate_first': True, 'output_dir': root / f'{name} first'}
        plain[f'fsdp2 {name} first'] |= {k: generating['saved'][k] for k in ('val_dataset', 'gkd_eval_source')}
    plain['fsdp2 checkpointing saved average'] = {**plain['fsdp2 saved average'], 'fsdp': 'fsdp2', 'output_dir': root / 'checkpointing'}
    plain['fsdp2 bf16'] = {**plain['fsdp2 separate'], 'torch_dtype': 'bfloat16', 'bf16': 'true', 'sft_alpha': 0}
    sharded = jobs('zero2', lambda name: {'deepspeed': 'zero2'}) | jobs('zero3', lambda name: {'deepspeed': 'zero3'})
    sharded |= jobs('zero3 offload', lambda name: {'deepspeed': files['offload']})
    adam = {**STEP, **TWO_PROCESSES, **cases['shared base'], **ADAM}
    sharded['zero3 offload adam'] = {**adam, 'deepspeed': 'zero3_offload'}
    sharded['zero3 no gather'] = {**sharded['zero3 generated'], 'ds3_gather_for_generation': 'false', 'output_dir': root / 'no gather'}
    sharded['zero2 few'] = {**sharded['zero3 few'], 'deepspeed': 'zero2', 'output_dir': root / 'zero2 few'}
    sharded['zero3 teacher zero0'] = {**sharded['zero3 generated'], 'teacher_deepspeed': 'zero0', 'output_dir': root / 'zero0'}
    teacher_alone = {**sharded['zero3 generated'], 'deepspeed': 'zero2', 'teacher_deepspeed': files['forgetful']}
    sharded['zero2 teacher zero3'] = {**teacher_alone, 'output_dir': root / 'zero2 teacher zero3'}
    no_gather = {'ds3_gather_for_generation': 'false', 'output_dir': root / 'zero2 teacher zero3 no gather'}
    sharded['zero2 teacher zero3 no gather'] = {**teacher_alone, **no_gather}
    for name, zero in NOT_AVERAGED.items():
        path = root / f'{name}.json'
        path.write_text(json.dumps({**json.loads(files['offload'].read_text()), 'zero_optimization': {'stage': 3, **zero}}))
        sharded[name] = {**sharded['zero3 average lora'], 'deepspeed': path}
    weights = shutil.copytree(tiny_models.student, root / 'broken')
    model = AutoModelForCausalLM.from_pretrained(weights)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float('nan')
    model.save_pretrained(weights)
    sharded['zero2 nan'] = {**sharded['zero2 separate'], 'model': weights}
    sharded['zero3 bf16'] = {**sharded['zero3 separate'], 'torch_dtype': 'bfloat16', 'bf16': 'true'}
    sharded['zero3 bf16 lora'] = {**sharded['zero3 shared base'], 'torch_dtype': 'bfloat16', 'bf16': 'true'}
    return run_jobs(plain, nproc=2, timeout=900) | run_jobs(sharded, nproc=2, timeout=900)


@pytest.mark.e2e
@pytest.mark.parametrize(('layout', 'name'), [(layout, name) for layout, names in LAYOUTS.items() for name in names])
def test_loss_and_gradient_are_those_of_whole_logits_in_one_process(one_process, layouts, gradient_difference, layout, name):
    run, whole = layouts[f'{layout} {name}'].ok(), one_process[SAME_AS.get(name, name)].ok()
    assert bool(run.seen['sharded']) == (layout in ('zero3', 'zero3 offload', 'fsdp2'))
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    for step in (1, 2):
        assert gradient_difference(run.gradients(step), whole.gradients(step)) < 1e-5


@pytest.mark.e2e
@pytest.mark.parametrize('layout', [layout for layout in LAYOUTS if layout != 'zero3 offload'])
def test_each_rank_holds_what_was_foretold(layouts, layout):
    """To the byte: weights with adapters, gradients, optimizer, teacher."""
    names = [*LAYOUTS[layout], *(('saved', 'saved lora', 'judged', 'bf16') if layout in ('zero3', 'fsdp2') else ())]
    names += ['bf16 lora'] * (layout == 'zero3')
    for name in names:
        held, foretold = layouts[f'{layout} {name}'].ok().memory
        assert held == foretold, name


@pytest.mark.e2e
@pytest.mark.parametrize('name', ['separate', 'topk', 'on host'])
def test_zero3_brings_a_separate_teacher_together_once_per_step(layouts, name):
    """For both micro-batches of a step, whose signals fit into what may be kept of them."""
    run = layouts[f'zero3 {name}'].ok()
    assert run.values('teacher/batches') == [1, 1]


@pytest.mark.e2e
@pytest.mark.parametrize('name', ['live lora', 'shared base', 'last layer', 'previous', 'extrapolated', 'average lora'])
def test_zero3_keeps_its_trace_over_several_forwards(layouts, name):
    """It forgets the check of the heads, in front of the first micro-batch, and nothing after that."""
    seen = layouts[f'zero3 {name}'].ok().seen
    assert seen['invalidated'] == 1
    # 4 micro-batches: at most one gather for both forwards and one for the backward pass, two while the order is being learnt.
    assert seen['heads_gathered'] <= 4 * 2 + 3


@pytest.mark.e2e
def test_zero3_offload_as_ms_swift_ships_it(one_process, layouts, gradient_difference):
    """With DeepSpeed's Adam, which works on the host; here by torch operations."""
    run, whole = layouts['zero3 offload adam'].ok(), one_process['adam'].ok()
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert abs(run.losses[-1] - run.losses[0]) > 0.01 * run.losses[0]
    for step in (1, 4):
        assert gradient_difference(run.gradients(step), whole.gradients(step)) < 1e-4


def by_row(run) -> dict:
    return {(line['step'], line['row']): (line['source'], line['completion']) for line in run.completions}


GENERATED = {
    'zero3 generated': 'generated',
    'zero3 no gather': 'generated',
    'zero3 teacher zero0': 'generated',
    'zero2 teacher zero3': 'generated',
    'zero2 teacher zero3 no gather': 'generated',
    'zero3 few': 'few',
    'zero2 few': 'few',
    'zero3 judged': 'judged',
    'zero3 generated shared': 'generated shared',
    'fsdp2 generated': 'generated',
    'fsdp2 few': 'few',
    'fsdp2 judged': 'judged',
    'fsdp2 generated shared': 'generated shared',
    'fsdp2 generated first': 'generated',
    'fsdp2 generated shared first': 'generated shared',
    'fsdp2 saved average first': 'saved average',
}


@pytest.mark.e2e
@pytest.mark.parametrize('name', GENERATED)
def test_responses_are_those_of_one_process(one_process, layouts, name):
    run, whole = layouts[name].ok(), one_process[GENERATED[name]].ok()
    assert by_row(run) == by_row(whole)
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize('layout', ['zero3', 'fsdp2'])
def test_each_rank_has_a_whole_reward_model(one_process, layouts, layout):
    """One that has nothing to score does not take part."""
    run, whole = layouts[f'{layout} judged'].ok(), one_process['judged'].ok()
    assert len(whole.values('reward')) == 2 and run.values('reward') == pytest.approx(whole.values('reward'), rel=1e-5)
    assert run.memory[0]['reward model weights'] == whole.memory[0]['reward model weights']


@pytest.mark.e2e
def test_a_zero3_teacher_of_a_zero2_student_is_gathered_once_for_all_tokens(layouts):
    once, each = (layouts[f'zero2 teacher zero3{how}'].ok().seen['gathered_of_teacher'] for how in ('', ' no gather'))
    assert 0 < once < each / 2


@pytest.mark.e2e
def test_a_rank_had_nothing_to_generate(one_process):
    lines = one_process['few'].ok().completions
    assert [(line['step'], line['row'] % 2) for line in lines] == [(1, 1), (1, 1), (2, 0)]


@pytest.mark.e2e
def test_ranks_with_whole_weights_do_not_wait_for_each_other(layouts):
    """Rank 0, which has nothing to generate at first, takes part under ZeRO-3 and not under ZeRO-2."""
    assert layouts['zero2 few'].ok().seen['lowest_layers'] < layouts['zero3 few'].ok().seen['lowest_layers']


@pytest.mark.e2e
@pytest.mark.parametrize('name', ['saved', 'saved lora', 'saved average'])
@pytest.mark.parametrize('layout', ['zero3', 'fsdp2'])
def test_evaluation_and_resume(one_process, layouts, layout, name):
    run, resumed, whole = layouts[f'{layout} {name}'].ok(), layouts[f'{layout} {name} resumed'].ok(), one_process[name].ok()
    assert run.losses == pytest.approx(whole.losses, rel=1e-4)  # Adam turns small differences of small gradients into large ones
    assert run.values('eval_loss') == pytest.approx(whole.values('eval_loss'), rel=1e-4)
    assert len(run.losses) == 2 and resumed.losses == pytest.approx(run.losses[1:], rel=1e-6)
    assert resumed.values('eval_loss') == pytest.approx(run.values('eval_loss')[1:], rel=1e-6)


@pytest.mark.e2e
@pytest.mark.parametrize('layout', ['zero3', 'fsdp2', 'fsdp2 checkpointing'])
def test_average_is_saved_whole(one_process, layouts, layout):
    for step in (1, 2):
        file = Path(f'checkpoint-{step}', 'gkd_teacher_average.safetensors')
        saved, whole = (load_file(run.output_dir / file) for run in (layouts[f'{layout} saved average'], one_process['saved average']))
        assert job_runs.relative(saved, whole) < 1e-4


@pytest.mark.e2e
@pytest.mark.parametrize('name', NOT_AVERAGED)
def test_average_refused(layouts, name):
    run = layouts[name]
    assert run.error.startswith('OptionError') and name in run.error and run.loaded == 0


@pytest.mark.e2e
def test_mixed_precision_does_not_round_the_loss(layouts):
    run = layouts['fsdp2 bf16'].ok()
    assert run.losses == pytest.approx(run.values('divergence'), rel=1e-5)  # bf16 has 8 bits
    assert layouts['zero3 bf16'].ok().losses[0] > 0


@pytest.mark.e2e
def test_nan_stops_before_deepspeed_takes_the_step(layouts):
    run = layouts['zero2 nan']
    assert run.error.startswith('FloatingPointError') and 'step 1' in run.error
    assert not (run.output_dir / 'gradients-1.pt').exists()
