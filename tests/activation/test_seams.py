"""Reading and rewriting of command lines, and options that come through --model_kwargs."""

from __future__ import annotations

import dataclasses
import sys
import typing
from types import ModuleType, SimpleNamespace

import pytest

from swift_gkd_plugin import activation
from swift_gkd_plugin.arguments import GKDOptions, OptionError
from swift_gkd_plugin.hf.host import RENAMED as HF_RENAMED
from swift_gkd_plugin.megatron.host import RENAMED as MEGATRON_RENAMED
from swift_gkd_plugin.seams import extended, for_gkd, modernise, option_fields, option_value, take_options


@pytest.mark.parametrize(
    ('line', 'value'),
    [
        ('', None),
        ('--a_b', ''),
        ('--a_b x', 'x'),
        ('--a_b=x', 'x'),
        ('--a-b x', 'x'),
        ('--a_b=x=y', 'x=y'),
        ('--a_b x --a_b y', 'y'),
        ('--a_bc x', None),
        ('a_b x', None),
        ('--a x', None),
    ],
)
def test_option_value(line, value):
    assert option_value(line.split(), '--a_b') == value


def test_beginnings_of_a_name_as_argparse_takes_them():
    for token in ('--rlh', '--rlhf', '--rlhf_t', '--rlhf-type'):
        assert option_value([token, 'gkd'], '--rlhf_type', shortest='--rlh') == 'gkd'
    for token in ('--rl', '--rlsd', '--rlhf_types', '-rlhf'):
        assert option_value([token, 'gkd'], '--rlhf_type', shortest='--rlh') is None


@pytest.mark.parametrize(
    ('renamed', 'old', 'new'),
    [
        (HF_RENAMED, '--train_type lora --lr 1', '--tuner_type lora --lr 1'),
        (HF_RENAMED, '--train-type=full', '--tuner_type=full'),
        (HF_RENAMED, '--lora_target_modules ALL --x ALL', '--target_modules all-linear --x ALL'),
        (HF_RENAMED, '--lora_target_modules=ALL', '--target_modules=all-linear'),
        (HF_RENAMED, '--lora_target_modules q_proj v_proj', '--target_modules q_proj v_proj'),
        (MEGATRON_RENAMED, '--load_safetensors true --save out', '--output_dir out'),
        (MEGATRON_RENAMED, '--save out --load_safetensors', '--output_dir out'),
        (MEGATRON_RENAMED, '--load_safetensors=true -h', '-h'),
        (MEGATRON_RENAMED, '--save_safetensors true --lr -1', '--save_safetensors true --lr -1'),
    ],
)
def test_modernise(renamed, old, new):
    argv, notices = modernise(old.split(), renamed)
    assert argv == new.split()
    assert len(notices) == len([token for token in old.split() if token not in new.split() and token.startswith('--')])


def test_every_new_spelling_is_an_option_of_the_installed_host():
    from swift.arguments import RLHFArguments

    names = {f.name for f in dataclasses.fields(RLHFArguments)}
    for old, entry in HF_RENAMED.items():
        assert entry.today[2:] in names and old[2:] not in names


def args(**values):
    return SimpleNamespace(model_kwargs=values.pop('model_kwargs', None), **values)


def test_options_by_model_kwargs():
    one = args(model_kwargs='{"gkd_loss_weight": 2, "gkd_tail": "renormalize", "gkd_temperature": null, "max_pixels": 7}')
    take_options(one)
    assert (one.gkd_loss_weight, one.gkd_tail, one.gkd_temperature, one.gkd_skew) == (2.0, 'renormalize', None, 0.1)
    assert isinstance(one.gkd_loss_weight, float)
    take_options(one)  # ms-swift's constructor passes here twice
    assert one.gkd_loss_weight == 2.0
    with_field = args(gkd_skew=0.5)
    take_options(with_field)
    assert with_field.gkd_skew == 0.5


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'gkd_loss_weigth': 1}, 'gkd_loss_weigth: not an option'),
        ({'GKD_SKEW': 0.2}, 'GKD_SKEW: not an option'),
        ({'gkd_loss_weight': '2'}, "gkd_loss_weight '2': must be a JSON number"),
        ({'gkd_temperature_squared': 1}, 'gkd_temperature_squared 1: must be a JSON true or false'),
        ({'gkd_teacher_max_completion_length': 1.5}, 'gkd_teacher_max_completion_length 1.5: must be a JSON integer'),
        ({'gkd_tail': None}, 'gkd_tail None: must be a JSON string'),
    ],
)
def test_wrong_options_by_model_kwargs(given, message):
    with pytest.raises(OptionError, match=f'^--model_kwargs {message}'):
        take_options(args(model_kwargs=given))


def test_option_given_in_both_places():
    with pytest.raises(OptionError, match=r'^--gkd_skew 0.5 and --model_kwargs gkd_skew 0.2: give one of them'):
        take_options(args(gkd_skew=0.5, model_kwargs={'gkd_skew': 0.2}))


@dataclasses.dataclass
class Stock:
    """The stock docstring."""

    rlhf_type: str = 'dpo'
    calls: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.calls.append('stock')


def test_extended_dataclass():
    new = extended(Stock, option_fields())
    assert (new.__name__, new.__module__, new.__doc__) == ('Stock', __name__, 'The stock docstring.')
    assert new(gkd_skew=0.5).gkd_skew == 0.5 and new().calls == ['stock']
    types = typing.get_type_hints(new)
    assert {name: types[name] for name in typing.get_type_hints(GKDOptions)} == typing.get_type_hints(GKDOptions)


def test_for_gkd_leaves_other_types_alone():
    class Local(Stock):
        pass

    @for_gkd(Local, '__post_init__')
    def before(self, stock):
        self.calls.append('ours')
        stock()

    assert Local().calls == ['stock']
    assert Local(rlhf_type='gkd').calls == ['ours', 'stock']
    assert Stock(rlhf_type='gkd').calls == ['stock']


def test_late_seam_reaches_whoever_has_imported_the_old_value(monkeypatch):
    source, reader = ModuleType('source_of_it'), ModuleType('reader_of_it')
    source.It = reader.Renamed = object()
    monkeypatch.setitem(sys.modules, 'source_of_it', source)
    monkeypatch.setitem(sys.modules, 'reader_of_it', reader)
    monkeypatch.setattr(activation, '_installed', set())
    activation._install({'source_of_it': lambda module: {'It': 'new'}})
    assert source.It == reader.Renamed == 'new'
    activation._install({'source_of_it': lambda module: {'It': 'again'}})
    assert source.It == 'new', 'every seam is applied once'
