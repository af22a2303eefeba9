"""swift-gkd doctor: what ruins a run is found before it, in words and for scripts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
from helpers import TinyModels, command_line, write_rows

from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.command import main
from swift_gkd_plugin.doctor.findings import LEVELS, WIDTH, Findings
from swift_gkd_plugin.doctor.training import Command, UsageError

QUICK = {'rlhf_type': 'gkd', 'split_dataset_ratio': 0, 'dataset_num_proc': 1, 'load_from_cache_file': 'false', 'check_model': 'false'}


# --- by itself


def test_a_refusal_is_an_error_with_what_to_do():
    found = Findings()
    with found.refusals('a'):
        raise OptionError('--x 1: too small, or too large; choose 2.')
    with found.refusals('b'):
        raise KeyError('y')
    with found.refusals('c'):
        pass
    assert [(f.name, f.level) for f in found] == [('a', 'error'), ('b', 'error')]
    assert (found[0].what, found[0].do) == ('--x 1: too small, or too large.', 'Choose 2.')
    assert 'KeyError' in found[1].what


def test_only_errors_fail():
    found = Findings()
    assert found.status == 0
    found.warning('a', 'Something.', 'Do it.')
    assert found.status == 0
    found.error('b', 'Something else.', 'Do that.')
    assert found.status == 1
    assert '  warning  Something.\n           → Do it.' in str(found) and str(found).endswith('1 error, 1 warning')


def test_the_appended_command():
    assert Command.of(['A=1', 'B=x=y', '/bin/swift', 'rlhf', '--x', '1']) == Command(False, ['--x', '1'], {'A': '1', 'B': 'x=y'})
    assert Command.of(['megatron', 'rlhf', '--x']) == Command(True, ['--x'])
    assert Command.of(['--x', '1']) == Command(False, ['--x', '1']) and Command.of(['run.yaml']).options == ['run.yaml']
    for words in (['swift', 'sft'], ['ls'], ['A=1'], ['megatron', 'rlhf', '--use_ray']):
        with pytest.raises(UsageError):
            Command.of(words)


def test_words_that_mean_nothing(capsys):
    assert main([]) == main(['treat']) == 2
    with pytest.raises(SystemExit) as ended:
        main(['doctor', '--', 'swift', 'sft'])
    assert ended.value.code == 2 and 'no training command' in capsys.readouterr().err


def test_what_pip_installs():
    lines = (Path(helpers.__file__).parents[1] / 'pyproject.toml').read_text().splitlines()
    assert lines[lines.index('[project.scripts]') + 1] == 'swift-gkd = "swift_gkd_plugin.command:main"'


# --- with training commands


CPU = {'PYTHONPATH': str(Path(helpers.__file__).parent / 'megatron' / 'cpu'), 'MEGATRON_ON_CPU': '1', 'USE_HF': '1'}


def thinker_of(model: Path, directory: Path) -> Path:
    """The same model with a chat template that can be asked to think."""
    shutil.copytree(model, directory)
    file = directory / 'chat_template.jinja'
    file.write_text(file.read_text() + '{% if enable_thinking %}<think>{% endif %}')
    return directory


def base_of(model: Path, directory: Path) -> Path:
    """The same model as a base: another end token, and no chat template."""
    shutil.copytree(model, directory)
    for name, values in (
        ('tokenizer_config.json', {'eos_token': '<|endoftext|>', 'chat_template': None}),
        ('config.json', {'eos_token_id': 0}),
        ('generation_config.json', {'eos_token_id': 0}),
    ):
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    (directory / 'chat_template.jinja').unlink(missing_ok=True)
    return directory


def answered(text: str, **columns: Any) -> dict[str, Any]:
    return {'messages': [{'role': 'user', 'content': 'what is 1 plus 2 ?'}, {'role': 'assistant', 'content': text}], **columns}


@pytest.fixture(scope='module')
def results(tiny_models: TinyModels, tmp_path_factory) -> dict[str, dict[str, Any]]:
    tmp = tmp_path_factory.mktemp('doctor')
    short, long = answered('1 plus 2 is 3 .'), answered('1 plus 2 is 3 . ' * 20)
    rows = {
        'some long': [*[short] * 12, *[long] * 4],
        'all long': [long] * 4,
        'endless': [answered('1 plus', add_eos=False), short],
        'privileged': [answered('3', teacher_prompt='1 plus 2 is 3 . what is 1 plus 2 ?')],
        'thoughts': [answered('<think>\nadd\n</think>\n\n3'), short],
    }
    rows = {name: write_rows(tmp / f'{name.replace(" ", "_")}.jsonl', content) for name, content in rows.items()}
    pair, alone = tiny_models.with_teacher, tiny_models.options
    same = {**alone, 'teacher_model': tiny_models.student, 'teacher_model_type': 'qwen3'}
    offline = {'lmbda': 0, 'output_dir': tmp / 'never'}
    cards = {'fits': '1', 'too small': '0.0001'}
    options: dict[str, dict[str, Any]] = {
        'plain': {**pair, 'output_dir': tmp / 'never'},
        'misspelt': {**pair, 'gkd_temprature': 2, 'learnin_rate': 4},
        'out of range': {**pair, 'beta': 3},
        'no number': {**pair, 'beta': 'abc'},
        'another algorithm': {**pair, 'rlhf_type': 'dpo'},
        'in vain': {**pair, 'gkd_skew': 0.3},
        'no file': {**pair, 'dataset': tmp / 'nothing.jsonl'},
        'base teaches': {**pair, 'teacher_model': base_of(tiny_models.teacher, tmp / 'base_teacher')},
        'base learns': {**pair, 'model': base_of(tiny_models.student, tmp / 'base_student')},
        'thinks': {**pair, 'teacher_model': thinker_of(tiny_models.teacher, tmp / 'thinker')},
        'itself': same,
        'itself, privileged': {**same, 'dataset': rows['privileged']},
        'fits': {**pair, 'tuner_type': 'full', 'per_device_train_batch_size': 1},
        'too small': {**pair, 'tuner_type': 'full'},
        **{name: {**pair, **offline, 'dataset': rows[name], 'max_length': 40} for name in ('some long', 'all long')},
        **{name: {**pair, **offline, 'dataset': rows[name]} for name in ('endless', 'thoughts')},
        'two ranks': {**pair, 'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 4, 'num_train_epochs': 2},
    }
    jobs, commands = [], tmp / 'jobs.json'
    for number, (name, given) in enumerate(options.items()):
        card = ['--gpu-memory', cards[name]] if name in cards else []
        words = [
            'doctor',
            '--json',
            *card,
            '--',
            *(['NPROC_PER_NODE=2', 'swift', 'rlhf'] if name == 'two ranks' else []),
            *command_line(QUICK | given),
        ]
        jobs.append({'words': [str(word) for word in words], 'result': str(tmp / f'{number}.json')})
    commands.write_text(json.dumps(jobs))
    status, output = helpers.run([sys.executable, Path(__file__).parent / 'jobs.py', commands])
    assert status == 0, output
    assert not (tmp / 'never').exists()  # nothing is written
    found = {}
    for job, name in zip(jobs, options, strict=True):
        result = json.loads(Path(job['result']).read_text())
        found[name] = json.loads(result['printed'])
        assert found[name]['status'] == result['status']
    return found


def levels(result: dict[str, Any], name: str) -> list[str]:
    return [f['level'] for f in result['findings'] if f['name'] == name]


def the(result: dict[str, Any], name: str, level: str) -> dict[str, Any]:
    (one,) = [f for f in result['findings'] if (f['name'], f['level']) == (name, level)]
    return one


def test_a_run_that_is_fine(results):
    found = results['plain']
    assert found['status'] == 0 and {f['level'] for f in found['findings']} <= {'ok', 'note'}, found
    assert {'environment', 'run', 'models', 'data', 'memory'} == {f['section'] for f in found['findings']}
    for name in ('trainer', 'sources', 'teacher', 'loss', 'operator', 'vocabulary', 'stop', 'template', 'thinking', 'length', 'rows'):
        assert set(levels(found, name)) == {'ok'}, name


def test_each_finding_says_what_to_do(results):
    for result in results.values():
        for finding in result['findings']:
            assert finding['level'] in LEVELS and '\n' not in finding['what'] + finding['do']
            assert finding['do'] or finding['level'] in ('ok', 'note'), finding


def test_a_misspelt_option_gets_the_nearest_name(results):
    found = results['misspelt']
    assert [f['do'] for f in found['findings'] if f['name'] == 'unknown_option'] == [
        'Write --gkd_temperature.',
        'Write --learning_rate.',
    ]
    assert found['status'] == 1


@pytest.mark.parametrize(
    ('name', 'kind', 'what'),
    [
        ('out of range', 'options', '--beta 3.0: must be in [0, 1]'),
        ('no number', 'value', "invalid float value: 'abc'"),
        ('another algorithm', 'rlhf_type', 'dpo'),
        ('no file', 'dataset', 'nothing.jsonl'),
        ('too small', 'memory', "Memory: in its phase '"),
        ('all long', 'max_length', '4 of 4 sampled rows (100.0%)'),
    ],
)
def test_what_ends_a_run_is_an_error(results, name, kind, what):
    assert what in the(results[name], kind, 'error')['what'] and results[name]['status'] == 1


@pytest.mark.parametrize(
    ('name', 'kind', 'what'),
    [
        ('in vain', 'unused', '--gkd_skew 0.3 is not used as such'),
        ('base teaches', 'stop_of_teacher', "Responses end with '<|im_end|>', and the teacher"),
        ('base teaches', 'template', 'has no chat template'),
        ('base learns', 'stop_of_student', "stop at '<|endoftext|>'"),
        ('thinks', 'thinking', 'The student thinks never, the teacher if asked to'),
        ('itself', 'equal', 'NOTHING TO LEARN'),
        ('some long', 'max_length', '4 of 16 sampled rows (25.0%) have more than --max_length 40 tokens of prompt and response'),
        ('endless', 'responses_end', '1 of 2 sampled rows (50.0%)'),
        ('thoughts', 'thoughts', '1 of 2 sampled responses have thoughts'),
    ],
)
def test_what_spoils_a_run_is_a_warning(results, name, kind, what):
    assert what in the(results[name], kind, 'warning')['what'] and results[name]['status'] == 0
    others = [other for other in results if other != name and 'warning' in levels(results[other], kind)]
    assert others == [], kind


def test_a_teacher_that_sees_more_has_something_to_say(results):
    assert levels(results['itself, privileged'], 'equal') == ['ok'] and levels(results['plain'], 'equal') == []
    assert 'shares the student' in the(results['itself'], 'teacher', 'ok')['what']


def test_the_plan_and_the_card(results):
    fits = the(results['fits'], 'memory', 'ok')['data']
    small = the(results['too small'], 'memory', 'error')['data']
    assert fits['peak'] == max(fits['phases'].values()) < fits['card'] == 2**30
    assert small['peak'] > small['card'] == int(0.0001 * 2**30)
    # A plan, though --gradient_accumulation_steps is not given.
    assert 'There is no card' in the(results['plain'], 'memory', 'note')['do']


def test_the_length_of_the_run(results):
    data = the(results['two ranks'], 'length', 'ok')['data']
    assert (data['rows'], data['responses'], data['updates_per_epoch'], data['updates']) == (64, 64, 4, 8)
    assert '2 ranks: DDP' in the(results['two ranks'], 'trainer', 'ok')['what']


def test_megatron_in_words(tiny_models, tmp_path):
    """The command that pip installs, in a process of its own: the other back end's checks and plan, without its process groups."""
    script = 'import sys; from swift_gkd_plugin.command import main; sys.exit(main())'
    layout = {'tuner_type': 'full', 'tensor_model_parallel_size': 2, 'train_iters': 3, 'output_dir': tmp_path / 'never'}
    words = ['doctor', 'NPROC_PER_NODE=2', 'megatron', 'rlhf', *command_line(QUICK | tiny_models.with_teacher | layout)]
    status, output = helpers.run([sys.executable, '-c', script, *words], env=CPU)
    assert output.startswith('environment\n  ok  ') and not (tmp_path / 'never').exists()
    assert max(map(len, output.split('\nmemory\n')[0].splitlines())) <= WIDTH
    assert 'swift_gkd_plugin.megatron.trainer.GKDTrainer on 2 ranks: megatron-core, TP2 x DP1; all parameters.' in output
    assert 'warning  Neither --lmbda nor vLLM is asked for' in output and ' 3 updates in all.' in ' '.join(output.split())
    assert 'Peak: ' in output and 'optimizer' in output.split('\nmemory\n')[1]
    # What stands in for transformer-engine here is no package: that alone is wrong.
    wrong = [line for line in output.splitlines() if line.startswith('  error ')]
    assert status == 1 and wrong and all('transformer-engine is not' in line or 'cannot be imported' in line for line in wrong), wrong
