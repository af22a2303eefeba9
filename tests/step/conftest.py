"""One template and one small dataset for all tests of the step."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
from fake_backend import FakeRun, arguments
from rank_cases import tiny_template, with_columns


@pytest.fixture(scope='session')
def template(tiny_models):
    return tiny_template(tiny_models.student)


@pytest.fixture(scope='session')
def rows(tiny_models):
    return [json.loads(line) for line in tiny_models.train.read_text().splitlines()]


@pytest.fixture(scope='session')
def dataset(rows):
    return with_columns(rows[:10])


@pytest.fixture
def make(template, dataset, tmp_path):
    """Makes a run from options, in a directory of its own unless ``output_dir`` says which."""
    numbers = itertools.count()

    def made(teacher='local', server=None, dataset=dataset, endless=False, output_dir=None, **options) -> FakeRun:
        args = arguments(output_dir or tmp_path / f'run {next(numbers)}', **options)
        return FakeRun(template, args, dataset, teacher=teacher, server=server, endless=endless)

    return made


@pytest.fixture
def said():
    """What was logged; ms-swift's logger keeps its records to itself."""
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger('swift')
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
