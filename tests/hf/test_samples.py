"""Views and micro-batches: the same response tokens under two prompts, and nothing trained that must not be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swift_gkd_plugin.responses import Response
from swift_gkd_plugin.step.data import Row
from swift_gkd_plugin.step.samples import IGNORED, Sample, SampleEncoder, TeacherView, predicting_positions
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
    encoder, one = SampleEncoder(vision_template, TeacherView(), engine=True), sample('student')
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
