"""``python rank_cases.py DIRECTORY STUDENT ROWS``: what several ranks do together, on gloo. What each rank has seen goes to a file.

Every case runs in every layout of ranks, by processes that are parted after the slow imports; alone, without any group, is a layout too.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from datasets import Dataset
from fake_backend import CPU, FEEDBACK, REWARDS, FakeRun, FakeServer, arguments, flat

from swift_gkd_plugin import sources
from swift_gkd_plugin.step.balance import Balancing
from swift_gkd_plugin.step.ranks import Ranks

# (owners of rows, ranks with the same rows)
LAYOUTS = {'alone': (1, 1), '2 owners': (2, 1), '2 sharers': (1, 2), '2 x 2': (2, 2)}


def tiny_template(student: Path):
    from swift.model import get_model_processor
    from swift.template import get_template

    _, processor = get_model_processor(str(student), model_type='qwen3', load_model=False)
    template = get_template(processor, template_type='qwen3', max_length=128, truncation_strategy='raise')
    template.set_mode('train')
    return template


def with_columns(rows: list[dict[str, Any]]) -> Dataset:
    """With those that reward functions read."""
    return Dataset.from_list([{**row, 'bonus': 1 + i % 3, 'half': 2 * i >= len(rows)} for i, row in enumerate(rows)])


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length.

    Attributes:
        passes: How often it was begun.
    """

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows, self.passes = rows, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.rows)


@dataclass(frozen=True)
class Rank:
    """One rank of a layout, with what every case starts from."""

    owner: int
    owners: int
    share: int
    ranks: Ranks
    root: Path
    template: Any
    rows: list[dict[str, Any]]

    @property
    def is_last(self) -> bool:
        return self.owner + 1 == self.owners and self.share + 1 == self.ranks.sharers

    def run(self, directory: str, dataset=None, server: FakeServer | None = None, **options: Any) -> FakeRun:
        """Four rows in a micro-batch of all ranks."""
        options = {'per_device_train_batch_size': 4 // self.owners, **options}
        args = arguments(self.root / directory, **options)
        who = 'local' if server is None else 'server'
        rows = self.dataset() if dataset is None else dataset
        return FakeRun(self.template, args, rows, self.ranks, who, server, self.owner, self.owners)

    def dataset(self, rows: list[dict[str, Any]] | None = None):
        return with_columns(self.rows[:14] if rows is None else rows)

    def leaves(self, call: Callable[[], Any]) -> str:
        """The error with which ``call`` ends."""
        try:
            call()
        except Exception as error:
            return f'{type(error).__name__}: {error}'
        return 'no error'


def summary(run: FakeRun) -> dict[str, Any]:
    logs = [{name: value for name, value in log.items() if not name.startswith(('seconds/', 'generation/'))} for log in run.logs]
    return {'losses': run.losses, 'logs': logs, 'samples': flat(run)}


MIXED = {'lmbda': 0.4, 'seq_kd': True}


def training(rank: Rank) -> dict[str, Any]:
    """Student and teacher answer, a server scores, and the last window of an epoch is short: 14 rows."""
    server = FakeServer(scores_with_answers=False)
    run = rank.run('training', server=server, max_steps=5, **MIXED).train()
    return {**summary(run), 'scored': len(server.scored), 'answered': len(server.answered)}


def local_teacher(rank: Rank) -> dict[str, Any]:
    run = rank.run('local', sft_alpha=0.3, max_steps=4).train()
    return {**summary(run), 'looked_at': run.backend.looked_at}


def rewarded(rank: Rank) -> dict[str, Any]:
    """The four responses to a prompt are on several ranks; some rows learn from the dataset."""
    run = rank.run('rewarded', gkd_num_samples=4, lmbda=0.7, steps_per_generation=3, max_steps=7, **REWARDS).train()
    return summary(run)


def fed_back(rank: Rank) -> dict[str, Any]:
    """What the teacher hears is about responses on several ranks; then one rank cannot encode what another one can."""
    options = {'gkd_num_samples': 4, 'lmbda': 0.7, 'steps_per_generation': 3, 'gkd_rl_weight': 0.0, **REWARDS, **FEEDBACK}
    run = rank.run('fed back', max_steps=7, **options).train()
    other = rank.run('fed back elsewhere', max_steps=7, **options)
    encode = other.conductor.encoder.prompt_with_feedback

    def fails(sample, text):
        if rank.is_last and sample.row.number % 2:
            raise ValueError('the host of the image does not answer')
        return encode(sample, text)

    other.conductor.encoder.prompt_with_feedback = fails
    return {**summary(run), 'elsewhere': summary(other.train())}


def feedback_fails(rank: Rank) -> dict[str, str]:
    """On the last owner."""
    run = rank.run('feedback fails', gkd_num_samples=4, lmbda=1, steps_per_generation=3, gkd_rl_weight=0.0, **REWARDS, **FEEDBACK)
    if rank.owner + 1 == rank.owners:
        run.conductor.rewarding.rewards.feedback.function = lambda response, /, **columns: 7
    return {'error': rank.leaves(run.train)}


def balanced(rank: Rank) -> dict[str, Any]:
    """Rows go to the rank that has time for them; a run that goes on in the middle of a cycle does the same."""
    options = {'sft_alpha': 0.3, 'max_steps': 6, 'steps_per_generation': 4, 'max_completion_length': 60}
    found = {}
    for name, how in {'plain': None, 'balanced': Balancing(), 'tokens': Balancing(tokens=100), 'server': Balancing()}.items():

        def run(directory: str, how=how, name=name, **more) -> FakeRun:
            server = {'server': FakeServer(scores_with_answers=False)} if name == 'server' else {}
            made = rank.run(directory, **server, **options, **more)
            made.backend.balancing = how
            return made

        whole = run(f'balanced {name}', save_steps=3).train()
        again = run(f'balanced {name} again').train(str(rank.root / f'balanced {name}' / 'checkpoint-3'))
        sizes = [[batch.size for batch in step] for step in whole.counted]
        found[name] = {**summary(whole), 'sizes': sizes, 'resumed': summary(again), 'steps': whole.steps}
    return found


def stream(rank: Rank) -> dict[str, Any]:
    """It begins again in the middle of a step, and a run goes on where another one was in it."""
    rows = Stream(rank.rows[:14])
    run = rank.run('stream', rows, max_steps=5, save_steps=3, **MIXED, server=FakeServer()).train()
    again = rank.run('stream again', Stream(rows.rows), max_steps=5, server=FakeServer(), **MIXED)
    again.train(str(rank.root / 'stream' / 'checkpoint-3'))
    return {**summary(run), 'passes': rows.passes, 'resumed': summary(again), 'evaluation': run.evaluate(Stream(rank.rows[:7]), 2)}


def speed(rank: Rank) -> list[float]:
    """Every look at the clock is a second later than the one before."""
    with mock.patch('swift_gkd_plugin.metrics.time.perf_counter', itertools.count().__next__):
        return [log['generation/tokens_per_second'] for log in rank.run('speed', lmbda=1, max_steps=3).train().logs]


def empty_shares(rank: Rank) -> dict[str, Any]:
    """One row per rank and cycle, so that some ranks have nothing to ask the engine, and in some cycles nobody has."""
    options = {'per_device_train_batch_size': 1, 'gradient_accumulation_steps': 1, 'steps_per_generation': 1, 'use_vllm': True}
    run = rank.run('empty', lmbda=0.4, max_steps=8, **options).train()
    return {'calls': run.backend.engine_calls, 'students': [sum(s['source'] == 'student' for b in step for s in b) for step in run.steps]}


def prefetch(rank: Rank) -> dict[str, Any]:
    run = rank.run('prefetch', use_vllm=True, gkd_prefetch=True, save_steps=1, max_steps=5).train()
    whole = summary(run)
    again = rank.run('prefetch again', use_vllm=True, gkd_prefetch=True, max_steps=5).train(str(rank.root / 'prefetch' / 'checkpoint-2'))
    return {**whole, 'resumed': summary(again), 'speeds': [log.get('generation/tokens_per_second') for log in run.logs]}


def _gone(rank: Rank, name: str, scores_with_answers: bool) -> dict[str, Any]:
    """The server of the last owner dies in the middle of each of the first steps; another run takes up what was left."""
    whole = rank.run(f'{name} whole', server=FakeServer(scores_with_answers=scores_with_answers), max_steps=3, **MIXED).train()
    found: dict[str, Any] = {'whole': summary(whole)}
    for dies_after in (1, 9):
        server = FakeServer(dies_after if rank.owner + 1 == rank.owners else None, scores_with_answers)
        run = rank.run(f'{name} {dies_after}', server=server, max_steps=3, save_steps=2, **MIXED)
        error, step = rank.leaves(run.train), run.backend.step
        checkpoint = Path(run.backend.checkpoint)
        kept = json.loads((checkpoint / f'gkd_cycle_rank{dist.get_rank() if dist.is_initialized() else 0}.json').read_text())
        responses = [one.get('token_ids') for batch in kept['micro_batches'] for one in batch]
        later = FakeServer(scores_with_answers=scores_with_answers)
        resumed = rank.run(f'{name} {dies_after} resumed', server=later, max_steps=3, **MIXED).train(str(checkpoint))
        found[str(dies_after)] = {
            'error': error,
            'step': step,
            'complete': run.backend.is_complete(str(checkpoint)),
            'responses': responses,
            'resumed': summary(resumed),
        }
    return found


def gone_while_scoring(rank: Rank) -> dict[str, Any]:
    return _gone(rank, 'scoring', scores_with_answers=False)


def gone_while_answering(rank: Rank) -> dict[str, Any]:
    return _gone(rank, 'answering', scores_with_answers=True)


def gone_while_evaluating(rank: Rank) -> dict[str, Any]:
    server = FakeServer()
    run = rank.run('evaluating', server=server, max_steps=2, gkd_eval_source='teacher', **MIXED).train()
    if rank.owner + 1 == rank.owners:
        server.left = 2
    error = rank.leaves(lambda: run.evaluate(rank.dataset(), batch_size=1))
    resumed = rank.run('evaluating resumed', server=FakeServer(), max_steps=4, **MIXED).train(run.backend.checkpoint)
    whole = rank.run('evaluating whole', server=FakeServer(), max_steps=4, **MIXED).train()
    return {
        'error': error,
        'complete': run.backend.is_complete(run.backend.checkpoint),
        'resumed': summary(resumed),
        'whole': summary(whole),
    }


def not_a_number(rank: Rank) -> dict[str, Any]:
    """In the loss of a row that one owner has."""
    whole = rank.run('nan whole', max_steps=2).train()
    row = whole.steps[1][0][0]['key'][0]  # of this rank
    run = rank.run('nan', max_steps=2)
    if rank.owner == 0:
        run.backend.nan = {row}
    error = rank.leaves(run.train)
    return {'row': row, 'error': error, 'step': run.backend.step, 'losses': run.losses, 'whole': whole.losses}


def evaluation(rank: Rank) -> dict[str, Any]:
    found = {}
    for source in ('dataset', 'student', 'teacher'):
        run = rank.run(f'evaluation {source}', gkd_eval_source=source, max_completion_length=4)
        found[source] = [run.evaluate(rank.dataset(rank.rows[:13]), size, at_once) for size, at_once in ((1, 1), (2, 3), (5, 2))]
    return found


def _cannot_encode(run: FakeRun, rank: Rank) -> FakeRun:
    """Each of two ranks with the same rows fails on a row that the other can encode; and on what stands in for the other's row."""
    texts = [row['messages'][0]['content'] for row in rank.rows]
    first, second = 3, 8
    stands_in = {row: sources.replacement_row(run.args.seed, 0, row, 0, 14) for row in (first, second)}
    fails = [{first, stands_in[second]}, {second, stands_in[first]}]
    mine = fails[rank.share] if rank.ranks.sharers > 1 else fails[0] | fails[1]
    questions, check = {texts[number] for number in mine}, run.conductor.encoder.check

    def checked(sample) -> None:
        if sample.content['messages'][0]['content'] in questions:
            raise ValueError('the host of the image does not answer')
        check(sample)

    run.conductor.encoder.check = checked
    return run


def one_rank_cannot_encode(rank: Rank) -> dict[str, Any]:
    return summary(_cannot_encode(rank.run('cannot', max_steps=4), rank).train())


def one_rank_cannot_encode_of_a_stream(rank: Rank) -> dict[str, Any]:
    return summary(_cannot_encode(rank.run('cannot stream', Stream(rank.rows[:14]), max_steps=4), rank).train())


def one_rank_cannot_encode_in_an_evaluation(rank: Rank) -> dict[str, Any]:
    return _cannot_encode(rank.run('cannot evaluate'), rank).evaluate(rank.dataset(), 4 // rank.owners)


def another_encoding(rank: Rank) -> dict[str, Any] | None:
    """The last rank has another word in one row."""
    if rank.owners > 1 and rank.ranks.sharers > 1:
        return None  # the other owner would wait for an end that torchrun makes
    rows = [json.loads(json.dumps(row)) for row in rank.rows[:14]]
    if rank.is_last:
        rows[5]['messages'][1]['content'] = 'another answer'
    run = rank.run('another', rank.dataset(rows), lmbda=0, max_steps=4)
    found = {'error': rank.leaves(run.train), 'steps': len(run.steps), 'rows': sorted(one['key'][0] for one in flat(run))}
    run = rank.run('another evaluated', rank.dataset(rows), lmbda=0)
    return {**found, 'evaluation': rank.leaves(lambda: run.evaluate(rank.dataset(rows)))}


CASES = [
    training,
    local_teacher,
    rewarded,
    fed_back,
    feedback_fails,
    balanced,
    stream,
    speed,
    empty_shares,
    prefetch,
    gone_while_scoring,
    gone_while_answering,
    gone_while_evaluating,
    not_a_number,
    evaluation,
    one_rank_cannot_encode,
    one_rank_cannot_encode_of_a_stream,
    one_rank_cannot_encode_in_an_evaluation,
    another_encoding,
]


def work(name: str, number: int, root: Path, template, rows) -> None:
    """One rank of a layout."""
    owners, sharers = LAYOUTS[name]
    owner, share = divmod(number, sharers)
    directory, world = root / name, owners * sharers
    ranks = Ranks(CPU)
    if world > 1:
        os.environ |= {'RANK': str(number), 'LOCAL_RANK': str(number), 'WORLD_SIZE': str(world), 'LOCAL_WORLD_SIZE': str(world)}
        limit = timedelta(seconds=10)
        dist.init_process_group('gloo', init_method=f'file://{directory}/store', rank=number, world_size=world, timeout=limit)
        if sharers > 1:
            sharing = [dist.new_group([o * sharers + s for s in range(sharers)], limit) for o in range(owners)]
            owning = [dist.new_group([o * sharers + s for o in range(owners)], limit) for s in range(sharers)]
            ranks = Ranks(CPU, owning[share], sharing[owner])
    rank = Rank(owner, owners, share, ranks, directory, template, rows)
    found: dict[str, Any] = {}
    for case in CASES:
        try:
            found[case.__name__] = case(rank)
        except Exception:
            # Where the others are is not known.
            found[case.__name__] = traceback.format_exc()
            break
    (directory / f'rank{number}.json').write_text(json.dumps(found))


def main(root: Path, student: Path, rows: Path) -> None:
    torch.set_num_threads(1)
    template = tiny_template(student)
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    for name, (owners, sharers) in LAYOUTS.items():
        (root / name).mkdir(parents=True)
        sys.stdout.flush()
        children = []
        for number in range(owners * sharers):
            pid = os.fork()
            if pid == 0:
                try:
                    work(name, number, root, template, content)
                except BaseException:
                    traceback.print_exc()
                finally:
                    # gloo's threads may talk to a peer that is gone already.
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
