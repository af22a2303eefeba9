"""Start-up checks that need no model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets

from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.checks import SAMPLED_ROWS, check_tags
from swift_gkd_plugin.step.remote import check_servers

SERVERS = [{'math', 'algebra'}, {'code'}]


def rows(*tags: object) -> Dataset:
    return Dataset.from_dict({'text': ['x'] * len(tags), 'kind': list(tags)})


def refusal(datasets: list, servers: list[set[str]] = SERVERS, column: str = 'kind') -> str:
    with pytest.raises(OptionError) as error:
        check_tags(datasets, column, servers)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_tags_that_servers_have():
    check_tags([rows('math', 'code', 'code'), None], 'kind', SERVERS)
    check_tags([rows('math'), rows('code')], 'kind', SERVERS)  # one of them only in the validation set
    check_tags([rows(1, 2)], 'kind', [{'1'}, {'2'}])


def test_a_row_without_a_server_wherever_it_is():
    """The rows of a second dataset come after all those of the first."""
    both = concatenate_datasets([rows(*['math', 'code'] * SAMPLED_ROWS), rows('maths')])
    message = refusal([both])
    assert f"row {2 * SAMPLED_ROWS} has the tag 'maths'" in message and 'algebra, code, math' in message
    assert "row 0 has the tag 'maths'" in refusal([rows('math', 'code'), rows('maths')])
    assert 'row 1 has the tag None' in refusal([rows('math', None, 'code')], [{'math', 'None'}, {'code'}])
    assert 'row 0 has the tag None' in refusal([rows('math', 'code')], column='dataset')


def test_a_server_without_a_row():
    message = refusal([rows('math', 'math')])
    assert '--teacher_tag_key kind' in message and 'no row is for the server of code, the rows have math' in message


def test_a_stream_is_not_read_to_its_end():
    read = []

    def endless():
        while True:
            read.append('math')
            yield {'kind': 'math'}

    check_tags([IterableDataset.from_generator(endless)], 'kind', SERVERS)
    assert SAMPLED_ROWS <= len(read) <= SAMPLED_ROWS + 1
    assert "row 0 has the tag 'maths'" in refusal([IterableDataset.from_generator(lambda: iter([{'kind': 'maths'}]))])


def test_tags_are_compared_before_a_server_is_asked():
    args = SimpleNamespace(
        teacher_model_server='[{"url": "http://127.0.0.1:9", "tags": ["math"]}, {"url": "http://127.0.0.1:10", "tags": ["code"]}]',
        teacher_tag_key='kind',
        gkd_loss_weight=1,
        seq_kd=False,
        gkd_logits_topk=4,
        gkd_server_timeout=1,
    )
    for tags, words in (('math', 'maths'), "'maths'"), (('math', 'math'), 'no row is for the server of code'):
        with pytest.raises(OptionError, match=words):
            check_servers(args, None, (rows(*tags), None))
