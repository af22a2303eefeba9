"""Questions of several owners in one forward of the teacher's."""

from __future__ import annotations

import itertools

import pytest
import torch

from swift_gkd_plugin.megatron.questions import Groups, Question, joined, together


def question(*rows: int, **more) -> Question:
    """Packed rows of these lengths whose last half is trained."""
    places = torch.cat([torch.arange(length) for length in rows])
    firsts = itertools.accumulate(rows, initial=0)
    index = torch.cat([torch.arange(first + length // 2, first + length - 1) for first, length in zip(firsts, rows, strict=False)])
    inputs = {'input_ids': torch.randint(100, (1, len(places))), 'position_ids': places[None], 'seq_lens': list(rows)}
    return Question({**inputs, **more}, index).keeping(True)


def test_what_is_joined_is_what_was_asked():
    asked = [question(4, 6), question(9).keeping(False), question(5)]
    whole = joined(asked)
    trained = [one.teacher_inputs['input_ids'][0, one.teacher_index] for one in asked]
    ids = whole.teacher_inputs['input_ids'][0, whole.teacher_index]
    assert torch.equal(ids, torch.cat(trained)) and whole.teacher_inputs['seq_lens'] == [4, 6, 9, 5]
    assert (whole.teacher_inputs['position_ids'][0] == 0).nonzero().flatten().tolist() == [0, 4, 10, 19]
    assert torch.equal(torch.cat([ids[part] for part in whole.kept]), torch.cat([trained[0], trained[2]]))
    groups = Groups(asked, [[0, 1, 2]], 2)
    assert len(groups.batches) == 2 and groups.batches[1].kept == ()
    first, nothing, last = groups.apart([torch.cat([trained[0], trained[2]])[:, None], torch.empty(0, 1)])
    assert torch.equal(first[:, 0], trained[0]) and len(nothing) == 0 and torch.equal(last[:, 0], trained[2])
    assert groups.apart([]) == []


@pytest.mark.parametrize('cp', [1, 2])
def test_added_tokens_are_behind_all_rows(cp):
    """Under context parallelism they are sequences of 2 cp tokens, else of one."""
    places, asked = torch.arange(2 * cp if cp > 1 else 1).repeat(2), []
    for one in (question(4, 8), question(8), question(12)):
        inputs = {name: value if name == 'seq_lens' else value.clone() for name, value in one.teacher_inputs.items()}
        inputs['input_ids'] = torch.cat([inputs['input_ids'], torch.full((1, len(places)), 777)], 1)
        inputs['position_ids'] = torch.cat([inputs['position_ids'], places[None]], 1)
        asked.append(Question(inputs, one.teacher_index).keeping(True))
    whole = joined(asked)
    ids, added = whole.teacher_inputs['input_ids'][0], 3 * len(places)
    assert (ids == 777).nonzero()[:, 0].tolist() == list(range(32, 32 + added)) and whole.end_of_rows == 32
    assert torch.equal(ids[whole.teacher_index], torch.cat([one.teacher_inputs['input_ids'][0, one.teacher_index] for one in asked]))
    assert torch.equal(whole.teacher_inputs['position_ids'][0, 32:], places.repeat(3))


@pytest.mark.parametrize(
    ('tokens', 'at_least', 'expected'),
    [
        (100, 1, [[0, 1, 2, 3]]),
        (16, 1, [[0, 1], [2, 3]]),
        (10, 1, [[0], [1, 2], [3]]),
        (0, 1, [[0], [1], [2], [3]]),
        (100, 2, [[0], [1, 2], [3]]),
    ],
)
def test_groups_in_order(tokens, at_least, expected):
    asked = [question(9), question(6), question(4), question(8)]
    assert together(asked, [True] * 4, tokens, at_least) == expected


def test_fillers_are_left_out_and_what_is_not_packed_text_stays_alone():
    asked = [question(9), question(6), question(6)]
    assert together(asked, [True, True, False], 100) == [[0, 1]]
    assert together(asked, [False] * 3, 100) == [[0]]
    for more in ({'pixel_values': torch.zeros(1)}, {'attention_mask': torch.zeros(1)}):
        assert together([*asked, question(5, **more)], [True] * 4, 100) == [[0], [1], [2], [3]]
