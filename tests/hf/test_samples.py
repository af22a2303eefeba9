"""Views and micro-batches: the same response tokens under two prompts, and nothing trained that must not be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from swift_gkd_plugin.responses import Response
from swift_gkd_plugin.step.data import Row
from swift_gkd_plugin.step.samples import IGNORED, MicroBatch, Sample, SampleEncoder, TeacherView, predicting_positions
from swift_gkd_plugin.teachers import HiddenStates, TopK
from swift_gkd_plugin.teachers.server import Scores

QUESTION = {'role': 'user', 'content': 'what is 3 plus 4 ?'}
ANSWER = {'role': 'assistant', 'content': '3 plus 4 is 7 .'}
PREFIX = '<think>\n\n</think>\n\n'


@pytest.fixture(scope='module')
def template(tiny_models):
    from swift.model import get_model_processor
    from swift.template import get_template

    _, processor = get_model_processor(str(tiny_models.student), model_type='qwen3', load_model=False)
    template = get_template(processor, template_type='qwen3', max_length=128, truncation_strategy='raise')
    template.set_mode('train')
    return template


def sample(source='dataset', response=None, counts=True, **columns):
    content = {'messages': [dict(QUESTION), dict(ANSWER)], **columns}
    return Sample(Row(5, 0, content, counts), content, source, response)


def trained(view):
    return [token for token, label in zip(view['input_ids'], view['labels'], strict=True) if label != IGNORED]


def checked(encoder, one):
    encoder.check(one)
    return encoder.views(one)


@pytest.mark.parametrize('source', ['student', 'teacher', 'dataset'])
def test_the_empty_think_block_is_prompt_whatever_the_source(template, source):
    ids = template.tokenizer.encode('it is 7', add_special_tokens=False)
    response = None if source == 'dataset' else Response(ids, 'length')
    view, other = checked(SampleEncoder(template, TeacherView()), sample(source, response))
    assert other is None
    prefix = template.tokenizer.encode(PREFIX, add_special_tokens=False)
    first = next(i for i, label in enumerate(view['labels']) if label != IGNORED)
    assert view['input_ids'][first - len(prefix) : first] == prefix
    if response:
        assert trained(view) == ids


def test_prompt_of_training_is_the_prompt_of_generation(template):
    encoder = SampleEncoder(template, TeacherView())
    one = sample('student', Response([20, 21, 22], 'length'))
    view, _ = checked(encoder, one)
    with template.generate_context():
        prompt = template.encode(encoder.student_prompt(one))['input_ids']
    assert view['input_ids'] == [*prompt, 20, 21, 22]


def test_a_prompt_cut_on_the_left_is_cut_alike_in_training_and_generation(template):
    encoder = SampleEncoder(template, TeacherView())
    one = sample('student', Response([20, 21, 22], 'length'))
    before = template.max_length
    template.truncation_strategy, template.max_length = 'left', 12
    try:
        view, _ = checked(encoder, one)
        with template.generate_context():
            prompt = template.encode(encoder.student_prompt(one))['input_ids']
    finally:
        template.truncation_strategy, template.max_length = 'raise', before
    assert len(prompt) == 12 and view['input_ids'] == [*prompt, 20, 21, 22] and trained(view) == [20, 21, 22]


def test_privileged_prompt_and_system_are_the_teachers_alone(template):
    encoder = SampleEncoder(template, TeacherView(system='You know it.'))
    student, teacher = checked(encoder, sample(teacher_prompt='3 plus 4 is 7. Now: what is 3 plus 4 ?'))
    assert trained(student) == trained(teacher) and student['input_ids'] != teacher['input_ids']
    text = [template.safe_decode(view['input_ids']) for view in (student, teacher)]
    assert 'You know it.' not in text[0] and 'You know it.' in text[1] and 'Now: what' in text[1]


def test_teachers_images_replace_the_students(template):
    inner = SampleEncoder.inner(sample(images=['a.png'], teacher_images=['b.png']))
    view = TeacherView()
    assert view.differs(inner) and view.of(inner).images == ['b.png'] and inner.images == ['a.png']
    assert view.of(SampleEncoder.inner(sample(images=['a.png'], teacher_images=[]))).images == []
    assert not view.differs(SampleEncoder.inner(sample(images=['a.png'])))


def test_thinking_of_the_teacher(template):
    encoder = SampleEncoder(template, TeacherView(enable_thinking=True))
    student, teacher = checked(encoder, sample('teacher', Response([20, 21], 'length')))
    assert trained(student) == trained(teacher) == [20, 21]
    assert len(teacher['input_ids']) < len(student['input_ids'])  # no empty think block in the teacher's prompt


def test_views_that_disagree_are_an_error(template, monkeypatch):
    encoder = SampleEncoder(template, TeacherView(system='x'))
    with pytest.raises(ValueError, match='row 5 of epoch 0'):
        encoder._matching_labels(sample(), [IGNORED, 7, 8], [IGNORED, IGNORED, 7, 9])


def test_truncated_student_view_leaves_the_same_tokens_to_the_teacher(template):
    encoder = SampleEncoder(template, TeacherView())
    template.truncation_strategy = 'left'
    try:
        assert encoder._matching_labels(sample(), [IGNORED, 8, 9], [IGNORED, 7, 8, 9]) == [IGNORED, IGNORED, 8, 9]
        template.truncation_strategy = 'right'
        assert encoder._matching_labels(sample(), [IGNORED, 7, 8], [IGNORED, 7, 8, 9]) == [IGNORED, 7, 8, IGNORED]
    finally:
        template.truncation_strategy = 'raise'


def test_empty_responses_and_fillers_have_no_trained_token(template):
    encoder = SampleEncoder(template, TeacherView(system='x'))
    empty = sample('student', Response([], 'stop'))
    full = sample('teacher', Response([20, 21, 22], 'stop'))
    for one in (empty, full):
        encoder.check(one)
    batch = encoder.micro_batch([empty, full, sample(counts=False)])
    assert batch.labels.tolist() == [20, 21, 22]
    assert batch.imitated.tolist() == [1, 1, 1] and len(batch.student_index) == len(batch.teacher_index) == 3


def test_own_tokens_are_not_imitated(template):
    encoder = SampleEncoder(template, TeacherView())
    samples = [sample('student', Response([20, 21], 'stop')), sample('teacher', Response([22], 'stop'))]
    for one in samples:
        encoder.check(one)
    assert encoder.micro_batch(samples).imitated.tolist() == [0, 0, 1]


class PretendedGPU(TorchFunctionMode):
    """Tensors stay on the CPU. Those on their way to a GPU have to be pinned, and nobody may wait for them."""

    def __init__(self):
        super().__init__()
        self.pinned, self.arrived = set(), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            self.pinned.add(args[0].data_ptr())
            return args[0]
        if func is torch.Tensor.to and args[1] == torch.device('cuda'):
            assert args[0].data_ptr() in self.pinned and kwargs == {'non_blocking': True}
            self.arrived.append(args[0])
            return args[0].clone()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'signal', [TopK(torch.rand(3, 4), torch.ones(3, 4).long(), 1.0, torch.rand(3)), HiddenStates(torch.rand(3, 8), 'its head')]
)
def test_the_host_waits_for_no_copy_of_a_micro_batch(signal):
    rows, index, ones = {'input_ids': torch.arange(6)[None], 'several': [torch.arange(2)]}, torch.arange(3), torch.ones(3)
    batch = MicroBatch([], rows, {**rows}, index, index + 1, index + 2, ones, ones + 1, [3], signal)
    gpu = PretendedGPU()
    with gpu:
        there = batch.to(torch.device('cuda'))
    tensors = [value for value in vars(signal).values() if isinstance(value, torch.Tensor)]
    assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in gpu.arrived}
    assert len(gpu.arrived) == 9 + len(tensors)
    for name, value in vars(signal).items():
        one = getattr(there.signal, name)
        assert torch.equal(one, value) and one is not value if isinstance(value, torch.Tensor) else one == value


def test_positions_predict_the_labels():
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [7, IGNORED, IGNORED, 8]])
    assert predicting_positions(labels).tolist() == [0, 1, 6]  # the first token of a row is predicted by nothing


def test_privileged_prompt_replaces_the_question_of_the_row_and_not_those_of_a_scheduler(template):
    encoder = SampleEncoder(template, TeacherView())
    one = sample('student', Response([20, 21, 22, 23], 'length'), teacher_prompt='it is 7, and what is 3 plus 4 ?')
    one.generated = encoder.inner(one)
    one.generated.messages = [dict(QUESTION), {'role': 'assistant', 'content': 'a'}, {'role': 'user', 'content': 'sure ?'}, dict(ANSWER)]
    one.generated.response_token_ids, one.generated.add_eos = [[20, 21], [22, 23]], False
    assert [m['content'] for m in encoder.teacher_view.of(one.generated).messages if m['role'] == 'user'] == [
        'it is 7, and what is 3 plus 4 ?',
        'sure ?',
    ]
    student, teacher = checked(encoder, one)
    assert trained(student) == trained(teacher) and len(teacher['input_ids']) > len(student['input_ids'])


@pytest.fixture
def vision_template(template, monkeypatch):
    """The template as one of a model with images, of which token 9 stands for one."""
    monkeypatch.setattr(template, 'placeholder_tokens', [9])
    monkeypatch.setattr(template.model_meta, 'is_multimodal', True)
    return template


@pytest.mark.parametrize(
    ('turns', 'masks', 'kept', 'reason'),
    [
        ([[20, 21], [22, 23]], None, [[20, 21], [22, 23]], 'stop'),
        ([[20, 21], [22, 9, 23]], None, [[20, 21], [22]], 'length'),
        ([[20, 9, 21], [22, 9]], None, [[20]], 'length'),
        ([[9, 20], [22]], None, [[]], 'length'),
        ([[20, 9, 21], [22, 9, 24]], [[1, 0, 1], [1, 1, 1]], [[20, 9, 21], [22]], 'length'),  # a scheduler's own image stays
    ],
)
def test_a_sampled_image_ends_the_response_of_an_engine(vision_template, turns, masks, kept, reason):
    encoder, one = SampleEncoder(vision_template, TeacherView()), sample('student')
    result = encoder.inner(one)
    result.messages = [dict(QUESTION), {'role': 'assistant', 'content': 'a'}, {'role': 'user', 'content': 'sure ?'}, dict(ANSWER)]
    result.response_token_ids, result.response_loss_mask, result.finish_reason, result.add_eos = turns, masks, 'stop', False
    result.rollout_logprobs = [[-1.0] * len(turn) for turn in turns]
    encoder.take(one, result)
    assert one.generated.response_token_ids == kept and one.response.finish_reason == reason
    assert [len(part) for part in one.generated.rollout_logprobs] == [len(turn) for turn in kept]
    assert [m['role'] for m in one.generated.messages] == ['user', 'assistant', 'user', 'assistant'][: 2 * len(kept)]
    student, _ = encoder.views(one)
    assert [t for t in trained(student) if t in (20, 21, 22, 23)] == [t for t in one.response.token_ids if t != 9]


def test_a_sampled_image_ends_the_response_of_a_teacher_server(vision_template):
    one = sample('teacher', Response([20, 21, 9, 22], 'stop'))
    one.scores = Scores(np.arange(8.0).reshape(4, 2), np.arange(8).reshape(4, 2))
    SampleEncoder(vision_template, TeacherView()).cut_before_media(one)
    assert one.response == Response([20, 21], 'length')
    assert one.scores.ids.tolist() == [[0, 1], [2, 3]] and one.scores.logprobs.tolist() == [[0, 1], [2, 3]]


@pytest.fixture
def count(template, monkeypatch):
    """How often the template has encoded anything."""
    encode, calls = template.encode, []
    monkeypatch.setattr(template, 'encode', lambda *args, **kwargs: calls.append(args) or encode(*args, **kwargs))
    return calls


def views_of(template, view, ids=(20, 21, 22), source='student', prompts=True, encoder=None, **columns):
    encoder = encoder or SampleEncoder(template, view)
    one = sample(source, **columns)
    encoder.check(one)
    one.response = Response(list(ids), 'length')
    if not prompts:
        one.prompts = None
    return encoder.views(one)


LONG = {'role': 'user', 'content': 'what is 3 plus 4 ? ' * 40}
HISTORY = [QUESTION, {'role': 'assistant', 'content': '7'}, {'role': 'user', 'content': 'and 4 plus 5 ?'}, ANSWER]


@pytest.mark.parametrize('source', ['student', 'teacher'])
@pytest.mark.parametrize(
    ('view', 'columns', 'encoded'),
    [
        (TeacherView(), {}, 0),
        (TeacherView(system='You know it.'), {}, 0),
        (TeacherView(enable_thinking=True), {}, 0),
        (TeacherView(), {'teacher_prompt': '3 plus 4 is 7. Now: what is 3 plus 4 ?'}, 0),
        (TeacherView(), {'messages': HISTORY}, 1),  # the first answer is trained too
    ],
)
def test_a_response_is_put_behind_the_encoded_prompt(template, count, source, view, columns, encoded):
    encoder = SampleEncoder(template, view)
    first = views_of(template, view, source=source, encoder=encoder, **columns)  # compared with encoding the whole
    assert first == views_of(template, view, source=source, prompts=False, **columns)
    for ids in ([23], [24, 25, 2], template.tokenizer.encode(PREFIX, add_special_tokens=False)):
        del count[:]
        found = views_of(template, view, ids, source, encoder=encoder, **columns)
        checks = 1 + (found[1] is not None)
        assert len(count) == checks + encoded
        assert found == views_of(template, view, ids, source, prompts=False, **columns)


@pytest.mark.parametrize('strategy', ['left', 'right'])
def test_a_prompt_that_was_cut_is_encoded_with_its_response(template, count, strategy, monkeypatch):
    monkeypatch.setattr(template, 'truncation_strategy', strategy)
    encoder = SampleEncoder(template, TeacherView())
    views_of(template, TeacherView(), encoder=encoder)
    del count[:]
    found = views_of(template, TeacherView(), encoder=encoder, messages=[LONG, ANSWER])
    assert len(count) == 2 and found == views_of(template, TeacherView(), prompts=False, messages=[LONG, ANSWER])


@pytest.mark.parametrize(('extra', 'calls'), [('mm_token_type_ids', 1), ('token_places', 2)])
def test_what_a_template_adds_for_each_token(template, count, monkeypatch, extra, calls):
    """Types of tokens go on as text; what is not known is left to the template."""
    encode = template._encode
    monkeypatch.setattr(template, '_encode', lambda inputs: (lambda e: {**e, extra: torch.zeros(len(e['input_ids']))})(encode(inputs)))
    encoder = SampleEncoder(template, TeacherView())
    for number in range(3):
        del count[:]
        student, _ = views_of(template, TeacherView(), encoder=encoder)
        assert len(student[extra]) == len(student['input_ids']) and len(count) == (2 if number == 0 else calls)


def test_a_loss_scale_sees_the_whole(template, count, monkeypatch):
    from swift.loss_scale import get_loss_scale

    scale = get_loss_scale('ignore_empty_think')
    monkeypatch.setattr(type(template), 'loss_scale', property(lambda self: scale))
    encoder = SampleEncoder(template, TeacherView())
    for _ in range(2):
        del count[:]
        views_of(template, TeacherView(), encoder=encoder)
        assert len(count) == 2


@pytest.mark.parametrize('source', ['student', 'teacher'])
def test_earlier_answers_are_trained_alike_whatever_the_source(template, source):
    """Their empty think block is prompt; one that the student has sampled itself is not."""
    prefix = template.tokenizer.encode(PREFIX, add_special_tokens=False)
    of_dataset, _ = checked(SampleEncoder(template, TeacherView()), sample('dataset', messages=HISTORY))
    generated, _ = views_of(template, TeacherView(), [*prefix, 20, 21], source, messages=HISTORY)
    earlier = trained(of_dataset)[: -len(template.tokenizer.encode('3 plus 4 is 7 .<|im_end|>\n', add_special_tokens=False))]
    assert trained(generated) == [*earlier, *prefix, 20, 21] and earlier[: len(prefix)] != prefix


def test_what_a_scheduler_has_asked_instead_is_the_prompt(template):
    encoder = SampleEncoder(template, TeacherView())
    views_of(template, TeacherView(), encoder=encoder)
    one = sample('student')
    encoder.check(one)
    result = encoder.inner(one)
    result.messages = [{'role': 'system', 'content': 'be terse'}, {'role': 'user', 'content': 'a hint: 7 ?'}, dict(ANSWER)]
    result.response_token_ids, result.finish_reason, result.add_eos = [[20, 21]], 'length', False
    encoder.take(one, result)
    student, _ = encoder.views(one)
    text = template.tokenizer.decode(student['input_ids'])
    assert 'be terse' in text and 'a hint' in text and trained(student) == [20, 21]


def test_the_filler_of_a_row_that_cannot_be_encoded_needs_no_view_of_the_teacher(template):
    one = sample(counts=False, messages=[{'role': 'nobody', 'content': 'a'}, dict(ANSWER)])
    student, teacher = SampleEncoder(template, TeacherView(system='be terse')).views(one)
    assert teacher is None and not trained(student)


def test_media_of_turns_that_are_cut_go_too(vision_template):
    """And log-probabilities of which only the last turn's are there."""
    encoder, one = SampleEncoder(vision_template, TeacherView()), sample('student', images=['row.png'])
    result = encoder.inner(one)
    asked = {'role': 'user', 'content': '<image>what is this ?'}
    result.messages = [asked, {'role': 'assistant', 'content': 'a'}, {'role': 'user', 'content': '<image>closer'}, dict(ANSWER)]
    result.images, result.rollout_infos = ['row.png', 'zoom.png'], {'images': ['row.png', 'zoom.png']}
    result.response_token_ids, result.rollout_logprobs, result.add_eos = [[20, 9], [22]], [[-1.0]], False
    encoder.take(one, result)
    assert one.generated.images == one.generated.rollout_infos['images'] == ['row.png'] and one.generated.rollout_logprobs == []
    assert one.response == Response([20], 'length')
