"""What surrounds the loss: evaluation, resuming, offloading, metrics, data-parallel optimizers, the other back end."""

from __future__ import annotations

import json
from collections import Counter

import commands
import helpers
import pytest
import reward_functions
from cases import LORA, MOE, make_datasets, plain
from runs import Run, compare_memory, relative
from teacher_cases import layout

from swift_gkd_plugin.sources import Draw

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.timeout(900)]

# A large epsilon, for Adam moves a weight by the whole learning rate however small its gradient is, rounding errors included.
STEPS = {'train_iters': 4, 'dataset': 'ten', 'adam_eps': 1e-3}
EVALUATED = {**STEPS, 'eval_steps': 2, 'val_dataset': 'val', 'lr': 0}
# A checkpoint in the middle of a generation cycle, which crosses the end of an epoch.
SAVED = {**STEPS, 'train_iters': 5, 'no_save_optim': 'false', 'save_steps': 3, 'steps_per_generation': 2}
ON_POLICY = {
    **STEPS,
    'lmbda': 0.5,
    'max_completion_length': 6,
    'log_completions': 'true',
    'steps_per_generation': 2,
}
# It begins again after 10 rows, in the middle of the third step.
STREAMED = {**ON_POLICY, **SAVED, 'streaming': 'true', 'eval_steps': 5, 'val_dataset': 'val'}
PASSES = {**ON_POLICY, **SAVED, 'train_iters': None, 'num_train_epochs': 2, 'gkd_num_samples': 3}
# Without an update, and in order: the second step has the last two rows and six fillers.
IN_ORDER = {**MOE, 'moe_aux_loss_coeff': 1, 'lr': 0, 'train_dataloader_shuffle': 'false', 'dataset_shuffle': 'false'}
FRESH = {**STEPS, 'tuner_type': 'lora', 'target_modules': 'all-linear'}
BALANCED = {**IN_ORDER, 'dataset': 'ten', 'global_batch_size': 8, 'train_iters': 2}
RECOMPUTED = {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 1}
SHARDED = {'use_distributed_optimizer': 'true', 'overlap_grad_reduce': 'true', 'overlap_param_gather': 'true', 'export': True}

# Groups cross a step's micro-batches, and the second step of a cycle learns from responses of the first one's student.
REWARDED = {
    **STEPS,
    'train_iters': 4,
    'lmbda': 0.6,
    'gkd_num_samples': 4,
    'steps_per_generation': 2,
    'max_completion_length': 6,
    'temperature': 0.7,
    'log_completions': 'true',
    'external_plugins': reward_functions.__file__,
    'reward_funcs': ['ids'],
    'gkd_rl_weight': 2.0,
    'epsilon': 0.001,
}
# The teacher's log-probability of the sampled token is all that is known of it, and ratios are those of whole responses.
SAMPLED = {
    **REWARDED,
    'sft_alpha': 0.5,
    'gkd_signal': 'sampled',
    'gkd_divergence': 'reverse_kl',
    'importance_sampling_level': 'sequence_token',
}

MEGATRON_ONLY = ('train_iters', 'adam_eps', 'dataset')
BOTH_AWAY = {'offload_teacher_model': 'true', 'gkd_optimizer_offload': 'true'}
BF16 = {'torch_dtype': 'bfloat16', 'bf16': 'true'}
TIGHT = 2**21  # bytes of a card that cannot hold both the visiting teacher and the optimizer

# Without a state of the optimizer, so that a run goes on in any layout, and as transformers trains.
SGD = {'optimizer': 'sgd', 'sgd_momentum': 0, 'weight_decay': 0, 'clip_grad': 0, 'lr': 0.2}
# Measured only, and told to a teacher, which is the student itself.
TOLD = {**REWARDED, **SGD, 'train_iters': 2, 'lmbda': 1, 'gkd_rl_weight': 0, 'teacher_model': None, 'gkd_self_teacher': 'live'}
EMA = {'teacher_model': None, 'gkd_self_teacher': 'ema', 'gkd_ema_decay': 0.5, 'sft_alpha': 1}
AVERAGED = {**STEPS, **EMA, **SGD}
GOES_ON = {**AVERAGED, 'finetune': 'false', 'no_load_optim': 'true'}
# The start of training, by either name, answers and looks.
ANSWERS = {**SGD, 'sft_alpha': 1, 'seq_kd': 'true', 'gkd_teacher_temperature': 0, 'max_completion_length': 6}
OF_THE_START = {**STEPS, **ANSWERS, **BOTH_AWAY, 'teacher_model': 'student'}
START_KEPT = {**STEPS, **ANSWERS, **EMA, 'gkd_ema_decay': 1}


@pytest.fixture(scope='module')
def data(tmp_path_factory, tiny_models):
    directory = tmp_path_factory.mktemp('data')
    val = directory / 'val.jsonl'
    val.write_text(''.join(tiny_models.val.read_text().splitlines(True)[:7]))
    nothing = directory / 'nothing.jsonl'
    nothing.write_text('')
    hinted = directory / 'hinted.jsonl'
    rows = map(json.loads, tiny_models.train.read_text().splitlines()[:10])
    helpers.write_rows(hinted, [{**row, 'teacher_prompt': reward_functions.hint(None, row['messages'][:1])} for row in rows])
    last_two = directory / 'last_two.jsonl'
    last_two.write_text(''.join(tiny_models.train.read_text().splitlines(True)[8:10]))
    return {**make_datasets(tiny_models.train, directory), 'val': val, 'nothing': nothing, 'hinted': hinted, 'last_two': last_two}


def jobs(data, **cases):
    return {name: {k: data[v] if k.endswith('dataset') else v for k, v in case.items()} for name, case in cases.items()}


@pytest.fixture(scope='module')
def alone(run_jobs, data, tmp_path_factory) -> dict[str, Run]:
    """One process, one run after the other."""
    answered, passes, averaged, streamed = (tmp_path_factory.mktemp(name) for name in ('answered', 'passes', 'averaged', 'streamed'))
    runs = run_jobs(
        jobs(
            data,
            steps={**STEPS, 'export': True},
            evaluated=EVALUATED,
            offloaded={**STEPS, **BOTH_AWAY, 'export': True},
            qwen2={'teacher_model': 'qwen2'},
            bf16=BF16,
            two_bf16={**BF16, 'train_iters': 2, 'export': True},
            two_bf16_offloaded={**BF16, 'train_iters': 2, 'export': True, 'gkd_teacher_offload': 'model', 'card': TIGHT},
            detailed={'gkd_detailed_metrics': 'true', 'sft_alpha': 0.1},
            tokenizers={'teacher_model': 'other_tokens'},
            empty={'dataset': 'nothing'},
            missing={'gkd_logits_topk': 100000},
            small_card={'card': 10**6},
            ranks=layout(tp=2),
            layout_of_base={**LORA, 'teacher_model': 'student', **layout(tp=1)},
            on_policy=ON_POLICY,
            on_policy_lora={**LORA, **ON_POLICY, 'lmbda': 1},
            answered={**ON_POLICY, **SAVED, 'save': True, 'output_dir': answered},
            answered_resumed={**ON_POLICY, **SAVED, 'mcore_model': answered / 'checkpoint-3', 'finetune': 'false'},
            streamed={**STREAMED, 'save': True, 'output_dir': streamed},
            streamed_resumed={**STREAMED, 'mcore_model': streamed / 'checkpoint-3', 'finetune': 'false'},
            endless={**STREAMED, 'train_iters': None},
            rewarded={**REWARDED, **SGD},
            sampled={**SAMPLED, **SGD},
            broken_reward={**REWARDED, 'reward_funcs': ['broken']},
            cut_groups={**REWARDED, 'gkd_num_samples': 3},
            told={**TOLD, 'gkd_feedback': 'hint'},
            told_by_a_column={**TOLD, 'dataset': 'hinted'},
            passes={**PASSES, 'save': True, 'output_dir': passes},
            passes_resumed={**PASSES, 'mcore_model': passes / 'checkpoint-9', 'finetune': 'false'},
            base={**LORA, **STEPS, 'teacher_model': 'student', 'export': True},
            self_teacher={**LORA, **STEPS, 'teacher_model': None, 'gkd_self_teacher': 'base'},
            two_teachers={**STEPS, 'gkd_self_teacher': 'live'},
            balanced=BALANCED,
            recomputed={**BALANCED, **RECOMPUTED},
            last_two={**IN_ORDER, 'dataset': 'last_two', 'global_batch_size': 2},
            averaged={**AVERAGED, 'save_steps': 2, 'save': True, 'output_dir': averaged},
            other_average={**GOES_ON, 'mcore_model': averaged / 'checkpoint-2', 'freeze_parameters': 'decoder.layers.0.'},
            averaged_sharded={**STEPS, **EMA},
            averaged_lora={**LORA, **STEPS, **EMA, 'gkd_ema_decay': 0},
            of_the_start=OF_THE_START,
            start_kept=START_KEPT,
            adapted={'teacher_adapters': 'teacher_adapter'},
            adapted_moe={**MOE, 'teacher_adapters': 'moe_teacher_adapter'},
            own_adapter={**FRESH, 'teacher_model': None, 'teacher_adapters': 'adapter'},
            own_adapter_by_name={**FRESH, 'teacher_model': 'student', 'teacher_adapters': 'adapter'},
            adapter_of_another={'teacher_adapters': 'adapter'},
            adapter_of_experts={'teacher_adapters': 'moe_teacher_adapter'},
            adapter_nowhere={'teacher_adapters': '/nowhere'},
            no_adapter_at_all={'teacher_adapters': 'teacher'},
            no_average={**GOES_ON, 'mcore_model': answered / 'checkpoint-3'},
            no_adapter={**STEPS, 'teacher_model': None, 'gkd_self_teacher': 'base'},
        )
    )
    return runs


@pytest.fixture(scope='module')
def parallel(run_jobs, data) -> dict[str, Run]:
    """Two data-parallel ranks, with the distributed optimizer and everything overlapped."""
    return run_jobs(
        jobs(
            data,
            steps={**STEPS, **SHARDED},
            on_policy={**ON_POLICY, **SHARDED},
            streamed=STREAMED,
            rewarded={**REWARDED, **SGD},
            sampled={**SAMPLED, **SGD},
            rewarded_sharded={**REWARDED, **SHARDED},
            evaluated=EVALUATED,
            evaluated_offloaded={**EVALUATED, 'offload_teacher_model': 'true'},
            base={**LORA, **STEPS, **SHARDED, 'teacher_model': 'student'},
            averaged_sharded={**STEPS, **EMA, **SHARDED},
            offloaded={**EVALUATED, **SHARDED, 'lr': 1e-3, **BOTH_AWAY},
        ),
        'DP2',
    )


@pytest.fixture(scope='module')
def split(run_jobs, data, alone, tmp_path_factory) -> dict[str, Run]:
    averaged = tmp_path_factory.mktemp('averaged')
    return run_jobs(
        jobs(
            data,
            on_policy=ON_POLICY,
            on_policy_lora={**LORA, **ON_POLICY, 'lmbda': 1},
            streamed=STREAMED,
            rewarded={**REWARDED, **SGD},
            sampled={**SAMPLED, **SGD},
            told={**TOLD, 'gkd_feedback': 'hint'},
            averaged={**AVERAGED, 'save_steps': 2, 'save': True, 'save_safetensors': 'true', 'output_dir': averaged},
            averaged_by_weights={**GOES_ON, 'model': averaged / 'checkpoint-2'},
            averaged_elsewhere={**GOES_ON, 'mcore_model': alone['averaged'].output_dir / 'checkpoint-2'},
        ),
        'TP2xPP2',
    )


def completions(run: Run) -> list[tuple]:
    rows = [json.loads(line) for line in (run.output_dir / 'completions.jsonl').read_text().splitlines()]
    return sorted((row['epoch'], row['row'], row['completion']) for row in rows)


def test_student_answers_the_same_in_every_layout(alone, parallel, split):
    for name in ('on_policy', 'on_policy_lora'):
        assert alone[name].ok().losses == pytest.approx(split[name].ok().losses, abs=1e-6)
        assert completions(alone[name]) == completions(split[name])
    assert parallel['on_policy'].ok().losses == pytest.approx(alone['on_policy'].losses, abs=1e-6)
    assert sorted(completions(parallel['on_policy'])) == completions(alone['on_policy'])
    assert 0 < sum(alone['on_policy'].values('source/student')) < 4
    assert alone['on_policy_lora'].values('source/student') == [1, 1, 1, 1]
    assert alone['on_policy'].values('response/length')


@pytest.fixture(scope='module')
def in_context_parallel(run_jobs, data) -> dict[str, Run]:
    of_rewards = {'rewarded': {**REWARDED, **SGD}, 'sampled': {**SAMPLED, **SGD}, 'told': {**TOLD, 'gkd_feedback': 'hint'}}
    return run_jobs(jobs(data, **of_rewards), 'CP2')


def test_rewards_are_the_same_in_every_layout(alone, parallel, split, in_context_parallel):
    """Scores, advantages, and what is left of them where they are clipped."""
    run = alone['rewarded'].ok()
    assert len(run.values('reward')) == 2 and min(map(abs, run.values('pg_loss'))) > 1e-3
    clipped = run.values('clip_ratio')
    assert len(clipped) == 2 and min(clipped) > 0  # in every second step
    for others in (parallel, split, in_context_parallel):
        other = others['rewarded'].ok()
        assert completions(other) == completions(run)
        for name in ('loss', 'divergence', 'reward', 'reward_std', 'frac_reward_zero_std', 'advantage/abs', 'pg_loss'):
            assert other.values(name) == pytest.approx(run.values(name), rel=1e-4, abs=1e-6), name
        assert other.values('clip_ratio') == pytest.approx(clipped, abs=0.05)
    assert parallel['rewarded_sharded'].ok().values('reward')


def test_a_sampled_signal_is_the_same_in_every_layout(alone, parallel, split, in_context_parallel):
    """With the ratios of responses that lie on two ranks."""
    run = alone['sampled'].ok()
    clipped = run.values('clip_ratio')
    assert min(map(abs, run.values('kl_sampled'))) > 1e-3 and min(clipped) > 0
    for others in (parallel, split, in_context_parallel):
        other = others['sampled'].ok()
        assert completions(other) == completions(run)
        for name in ('loss', 'kl_sampled', 'distill_loss', 'pg_loss'):
            assert other.values(name) == pytest.approx(run.values(name), rel=1e-4, abs=1e-6), name
        assert other.values('clip_ratio') == pytest.approx(clipped, abs=0.05)


def test_a_feedback_is_a_teacher_prompt_in_every_layout(alone, split, in_context_parallel):
    run = alone['told'].ok()
    assert min(run.values('divergence')) > 1e-4 and run.values('feedback/share') == [1]
    for other in (alone['told_by_a_column'], split['told'], in_context_parallel['told']):
        assert completions(other.ok()) == completions(run)
        for name in ('loss', 'divergence', 'reward'):
            assert other.values(name) == pytest.approx(run.values(name), rel=1e-4, abs=1e-6), name


def test_rewards_that_cannot_be(alone):
    error = alone['broken_reward'].error
    assert error.startswith('RewardError: Step 3: reward function broken (Broken) failed: ValueError: no judge is there')
    assert (alone['broken_reward'].output_dir / 'checkpoint-2' / 'latest_checkpointed_iteration.txt').exists()
    error, loaded = alone['cut_groups'].error, alone['cut_groups'].loaded
    assert '--gkd_num_samples 3' in error and '--global_batch_size), 4, are no multiple' in error and loaded == 0


def test_a_rank_holds_what_was_foretold(alone, parallel, split):
    """Weights, gradients, optimizer and teacher: whole, quantities of a data-parallel rank, of a stage and of a shard."""
    names = ('steps', 'offloaded', 'qwen2', 'bf16', 'two_bf16_offloaded', 'on_policy_lora', 'base')
    for run in (*(alone[name] for name in names), *(parallel[name] for name in ('on_policy', 'offloaded', 'base')), *split.values()):
        compare_memory(run.ok())


def test_log_is_written_when_the_step_ends(alone):
    """Stock's thread may still have the last lines when the process ends."""
    seen = alone['steps'].ok().seen
    assert seen['log_writers'] == 1 and seen['log_threads'] == 0


def test_resumed_is_not_interrupted(alone):
    assert alone['answered_resumed'].ok().losses == alone['answered'].ok().losses[3:]
    responses = [[(a['key'], a['token_ids']) for a in alone[name].answers] for name in ('answered', 'answered_resumed')]
    assert responses[1] == responses[0][-len(responses[1]) :] and responses[1]


def test_a_stream_is_the_same_in_every_layout_and_after_a_checkpoint(alone, parallel, split):
    run = alone['streamed'].ok()
    assert len(run.losses) == 5 and len(completions(run)) > 0
    assert {row for _, row, _ in completions(run)} <= set(range(10)) and {epoch for epoch, _, _ in completions(run)} <= {0, 1}
    for other in (parallel['streamed'], split['streamed']):
        assert other.ok().losses == pytest.approx(run.losses, abs=1e-6) and completions(other) == completions(run)
        assert other.values('eval_loss') == pytest.approx(run.values('eval_loss'), abs=1e-6) and other.values('eval_rows') == [7]
    assert alone['streamed_resumed'].ok().losses == run.losses[3:]
    assert alone['endless'].loaded == 0 and '--streaming True: a stream has no length; give --train_iters.' in alone['endless'].error


def test_all_responses_of_all_epochs(alone):
    """The passes have 24 and 18 responses: 21 in each of the trainer's epochs, in 6 steps. At 3 places for each row it would be 8."""
    draw = Draw(seed=42, lmbda=0.5, num_samples=3)
    run = alone['passes'].ok()
    assert len(run.losses) == 12
    times = {(epoch, row): draw.repeats(epoch, row) for epoch in range(2) for row in range(10)}
    assert Counter((epoch, row) for epoch, row, _ in completions(run)) == {pair: 3 for pair, n in times.items() if n == 3}
    assert alone['passes_resumed'].ok().losses == run.losses[9:]


def test_evaluation_is_a_fixed_measurement(alone, parallel):
    first, *others = alone['evaluated'].ok().values('eval_loss')
    assert len(others) == 1 and others == [first]
    assert alone['evaluated'].values('eval_rows') == [7, 7]
    assert parallel['evaluated'].ok().values('eval_loss') == pytest.approx([first, first], abs=1e-7)
    assert parallel['evaluated'].values('eval_tokens') == alone['evaluated'].values('eval_tokens')
    assert alone['evaluated'].values('eval_divergence') == pytest.approx([first, first], abs=1e-7)


def test_sharded_optimizer_trains_the_same(alone, parallel):
    for name in ('steps', 'base'):
        assert parallel[name].ok().losses == pytest.approx(alone[name].ok().losses, abs=1e-6)
        assert relative(parallel[name].saved('weights'), alone[name].saved('weights')) < 1e-5
    assert alone['base'].loaded == 2  # the student and its adapter, no second copy


def test_the_base_by_either_name(alone):
    assert alone['self_teacher'].ok().losses == alone['base'].losses
    assert '--gkd_self_teacher live and --teacher_model' in alone['two_teachers'].error
    assert 'there is no adapter to switch off' in alone['no_adapter'].error


def test_auxiliary_loss_of_routers(alone):
    """What it has to be is held against transformers in test_parity.py. Of fillers it is nothing, also where layers run again in the
    backward pass."""
    first, second = alone['balanced'].ok().values('grad_norm')
    assert [second] == pytest.approx(alone['last_two'].ok().values('grad_norm'), rel=1e-5)
    assert [first, second] == pytest.approx(alone['recomputed'].ok().values('grad_norm'), rel=1e-5)


def test_offloading_changes_nothing(alone, parallel):
    run = alone['offloaded'].ok()
    assert run.losses == alone['steps'].losses
    assert min(run.values('teacher/moved_gib')) > 0
    assert parallel['offloaded'].ok().losses == parallel['steps'].losses


def test_offloaded_teacher_has_the_place_of_the_gradients(alone, parallel):
    assert alone['steps'].seen['gradient_bytes'] > 0 and parallel['steps'].seen['gradient_bytes'] > 0
    assert alone['offloaded'].seen['gradient_bytes'] == parallel['offloaded'].seen['gradient_bytes'] == 0


def test_optimizer_leaves_for_a_visit_and_comes_back(alone, parallel):
    """Whole in one process and shared by two, because it was asked for; in bf16 because the card is small. Before the first update there
    are no moments, and in fp32 no weights of its own."""
    for run, other, first in (
        (alone['offloaded'], alone['steps'], 0),
        (parallel['offloaded'], parallel['steps'], 0),
        (alone['two_bf16_offloaded'], alone['two_bf16'], 1 / 3),
    ):
        assert run.ok().losses == other.ok().losses
        assert relative(run.saved('weights'), other.saved('weights')) == 0
        assert run.seen['optimizer_bytes'] == 0 < other.seen['optimizer_bytes']
        foretold = run.seen['foretold']['optimizer']
        moved = [2**30 * gib for gib in run.values('optimizer/moved_gib')]
        assert moved == pytest.approx([first * foretold, *[foretold] * (len(run.losses) - 1)], rel=1e-3), run.output_dir.name
        assert min(run.values('seconds/optimizer_offload')) > 0
    assert parallel['evaluated_offloaded'].seen['optimizer_bytes'] > 0  # nobody has asked for it
    assert not parallel['evaluated_offloaded'].values('optimizer/moved_gib')
    said = alone['two_bf16_offloaded'].output
    assert ' of host memory; --gkd_optimizer_offload false keeps it on the device.' in said


def test_replicas_share_the_copy_on_the_host(parallel):
    """An evaluation waits for its rows there, and is the same."""
    run = parallel['evaluated_offloaded'].ok()
    assert ' of host memory, shared by 2 ranks; ' in run.output
    assert run.losses == parallel['evaluated'].losses
    assert run.values('eval_loss') == pytest.approx(parallel['evaluated'].ok().values('eval_loss'), abs=1e-7)


def test_teacher_of_another_family(alone, models):
    run = alone['qwen2'].ok()
    loss, gradients = plain(run, {'teacher_model': 'qwen2'}, models)
    assert run.losses[0] == pytest.approx(loss, abs=1e-6)
    assert relative(run.gradients, gradients) < 1e-5


@pytest.mark.parametrize(('name', 'teacher'), [('adapted', 'adapted'), ('adapted_moe', 'moe_adapted')])
def test_teacher_with_adapters_is_what_they_make_of_it(alone, models, name, teacher):
    run = alone[name].ok()
    loss, gradients = plain(run, {'model': 'moe' if 'moe' in name else 'student', 'teacher_model': teacher}, models)
    assert run.losses[0] == pytest.approx(loss, abs=1e-6)
    assert relative(run.gradients, gradients) < 1e-5


def test_adapter_on_the_base_of_the_student(alone):
    """JSD at beta 0.5 is symmetric: base taught by base + adapter is as far away as base + adapter taught by base."""
    first = alone['base'].ok().losses[0]
    for name in ('own_adapter', 'own_adapter_by_name'):
        assert alone[name].ok().losses[0] == pytest.approx(first, rel=1e-4) and first > 0


def test_payload_is_hidden_states_of_trained_tokens(alone):
    run = alone['bf16'].ok()
    tokens = sum(len(batch['labels']) for batch in run.saved('batches'))
    seen = {'payload': tokens * 64, 'payload_dtype': 'torch.bfloat16', 'log_writers': 1, 'log_threads': 0}
    assert run.seen.items() >= seen.items()
    assert run.losses == pytest.approx(alone['steps'].losses[:1], rel=0.2)


def test_metrics_have_the_names_of_the_other_back_end(alone):
    (row,) = (row for row in alone['detailed'].ok().logs if 'loss' in row)  # ms-swift writes its last line from another thread
    named = ('loss', 'divergence', 'cross_entropy', 'source/dataset', 'tokens/trained', 'seconds/teacher', 'seconds/student')
    detail = ('forward_kl', 'reverse_kl', 'student_entropy', 'teacher_entropy', 'top1_agreement', 'teacher_prob_of_label')
    assert row.keys() >= {*named, *detail}
    assert row['loss'] == pytest.approx(row['divergence'] + 0.1 * row['cross_entropy'], abs=1e-6)
    assert row['tokens/trained'] == sum(len(batch['labels']) for batch in alone['detailed'].saved('batches'))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('tokenizers', 'have different tokenizers: id '),
        ('empty', '--dataset: the dataset has 0 rows'),
        ('missing', '--gkd_logits_topk 100000: the student has 512 token ids'),
        ('adapter_of_another', 'in --teacher_model '),
        ('adapter_of_experts', ' has no weight of this name; give an adapter of this model'),
        ('adapter_nowhere', '--teacher_adapters /nowhere: it was not found ('),
        ('no_adapter_at_all', 'there is no adapter_config.json in it; give the directory of an adapter'),
        ('small_card', 'a rank holds 1.9 MiB at least (teacher weights 738.8 KiB, '),
        ('ranks', '--teacher_tensor_model_parallel_size 2 x --teacher_pipeline_model_parallel_size 1 x '),
        (
            'layout_of_base',
            '--teacher_tensor_model_parallel_size 1: only a --teacher_model other than the student has a layout of its own',
        ),
    ],
)
def test_bad_input_before_any_weights(alone, name, message):
    assert alone[name].error.startswith('OptionError: ') and message in alone[name].error and '\n' not in alone[name].error
    assert alone[name].loaded == 0


def test_average_goes_on_in_any_layout(alone, split):
    whole = alone['averaged'].ok().losses
    assert split['averaged'].ok().losses == pytest.approx(whole, rel=1e-6)
    for name in ('averaged_by_weights', 'averaged_elsewhere'):
        assert split[name].ok().losses == pytest.approx(whole[2:], rel=1e-6), name
    other = alone['other_average'].error
    assert 'its gkd_teacher_average has' in other and 'only one of them has decoder.layers.0.' in other and '\n' not in other
    assert '--mcore_model' in alone['no_average'].error and 'there is no gkd_teacher_average in it' in alone['no_average'].error
    assert alone['no_average'].loaded == 0


def test_average_follows_gathered_weights(alone, parallel):
    assert parallel['averaged_sharded'].ok().losses == pytest.approx(alone['averaged_sharded'].ok().losses, abs=1e-6)


def test_average_without_a_past_is_the_student(alone):
    run = alone['averaged_lora'].ok()
    assert run.values('divergence') == [0, 0, 0, 0] and run.losses[-1] != run.losses[0]


def test_average_of_the_start_is_a_copy_of_it(alone):
    """Looking and answering."""
    copy, kept = alone['of_the_start'].ok(), alone['start_kept'].ok()
    for name in ('loss', 'divergence'):
        assert kept.values(name) == pytest.approx(copy.values(name), abs=1e-6)
    assert min(copy.values('divergence')[1:]) > 1e-4
    assert [(a['key'], a['source'], a['token_ids']) for a in kept.answers] == [(a['key'], 'teacher', a['token_ids']) for a in copy.answers]
    assert kept.loaded == copy.loaded - 1


@pytest.mark.parametrize('name', ['evaluated', 'averaged', 'rewarded', 'sampled'])
def test_same_numbers_as_swift_rlhf(alone, models, data, tmp_path, name):
    sgd = {'learning_rate': 0.2, 'optim': 'sgd', 'lr_scheduler_type': 'constant', 'warmup_ratio': 0, 'weight_decay': 0, 'max_grad_norm': 0}
    teacher = {'teacher_model': models['teacher'], 'teacher_model_type': 'qwen3'}
    rewarded, sampled = ({key: value for key, value in of.items() if key not in MEGATRON_ONLY} for of in (REWARDED, SAMPLED))
    options = {
        'rlhf_type': 'gkd',
        'model': models['student'],
        'model_type': 'qwen3',
        'template': 'qwen3',
        'dataset': data['ten'],
        'tuner_type': 'full',
        'lmbda': 0,
        'max_length': 128,
        'per_device_train_batch_size': 1,
        'gradient_accumulation_steps': 4,
        'max_steps': 3,
        **{
            'evaluated': {**teacher, 'learning_rate': 0},
            'averaged': {**sgd, 'gkd_self_teacher': 'ema', 'gkd_ema_decay': 0.5, 'sft_alpha': 1},
            'rewarded': {**sgd, **teacher, **rewarded, 'steps_per_generation': 8},  # in micro-batches
            'sampled': {**sgd, **teacher, **sampled, 'steps_per_generation': 8},
        }[name],
        'output_dir': tmp_path,
    }
    argv = helpers.command_line({**helpers.QUICK, **options})
    status, output = commands.run_here(helpers.script('rlhf')[1], *argv, cwd=tmp_path)
    assert status == 0, output[-6000:]
    other = Run(tmp_path, None, 0, '', output)
    assert other.losses == pytest.approx(alone[name].ok().losses[:3], rel=1e-5, abs=1e-6)
    if name == 'averaged':
        assert other.values('divergence') == pytest.approx(alone[name].values('divergence')[:3], abs=1e-6)
        assert min(other.values('divergence')[1:]) > 1e-4
