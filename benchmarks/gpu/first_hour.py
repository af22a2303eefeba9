"""The first hour on a GPU: everything that this project claims about one, checked and measured without anybody watching.

    python benchmarks/gpu/first_hour.py --minutes 25 --out DIR

Python 3.10, torch 2.10 with CUDA and Triton 3.5, or later ones of them, are all that most of it needs; there is no network
to be used. The parts, most telling first, each in a file of its own here:

    checks     the operator on the device, against its definition in float64
    products   matrix products alone, by chunk size and width
    sweeps     the operator's kernels, each by itself
    heads      output heads and loss, forward and backward, beside the bare products, Liger, ms-swift and TRL
    moving     a teacher's weights that visit the device, pinned memory, the moving average
    training   whole steps of `swift rlhf`, stock beside ours, where ms-swift is installed

A part runs in a process of its own. What fails there is recorded and skipped, an error that takes the GPU's context with it
and a case that never ends, too. DIR gets

    rows.jsonl    one line per measurement, written when it is finished; a second run with the same DIR goes on from there
    table.md      all of them as one table, also printed at the end
    PART.log      what the part printed

`--device cpu --tiny` runs all of it dry: small sizes, no GPU, numbers without a meaning.
"""

import argparse
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import takewhile
from pathlib import Path

import plan
from table import table

# In this order; a part may take the share of what is left when its turn comes, and what it leaves is the others'.
PARTS = {'checks': 4, 'products': 2, 'sweeps': 3, 'heads': 9, 'moving': 3, 'training': 6}
START_LIMIT = 180  # seconds to import torch and find the GPU
LAST_WORDS = 300  # characters of a log that go into a row


class Clocks:
    """The GPU's clock and power twice a second, where nvidia-smi says them."""

    FIELDS = ('clocks.sm', 'clocks.mem', 'power.draw', 'temperature.gpu')

    def __init__(self):
        self.seen: list[tuple[float, list[float]]] = []
        command = ['nvidia-smi', '-i', plan.gpu(), f'--query-gpu={",".join(self.FIELDS)}', '--format=csv,noheader,nounits', '-lms', '500']
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.process = None
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            try:
                self.seen.append((time.time(), [float(x) for x in line.split(',')]))
            except ValueError:  # [N/A]
                continue

    def between(self, start: float, end: float) -> dict:
        """The highest of each: between two measurements of a case the GPU rests."""
        seen = [values for at, values in self.seen if start <= at <= end]
        if not seen:
            return {}
        sm, mem, watts, degrees = (max(column) for column in zip(*seen, strict=True))
        return {'sm_mhz': sm, 'memory_mhz': mem, 'watts': watts, 'degrees': degrees}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()


class Run:
    def __init__(self, args):
        self.args, self.out = args, Path(args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.deadline = self.began + 60 * args.minutes - 5  # to write the table and end
        self.clocks, self.child = Clocks(), None
        self.file = self.out / 'rows.jsonl'
        self.rows = _read_rows(self.file)
        self.scratch = self.out / 'scratch'

    # ---- rows ----

    def write(self, part: str, case: dict, **row) -> None:
        row = {'part': part, 'case': case['name'], **row, 'at_s': round(time.monotonic() - self.began, 1)}
        self.rows.append(row)
        with self.file.open('a') as file:
            file.write(json.dumps(row) + '\n')
            file.flush()
            os.fsync(file.fileno())
        print(*(f'{key}={value}' for key, value in row.items()), flush=True)

    def fail(self, part: str, case: dict, why: str) -> None:
        self.write(part, case, status='failed', why=why.rstrip(': '))

    def save_table(self) -> str:
        text = table(self.rows)
        new = self.out / 'table.md.new'
        new.write_text(text)
        new.replace(self.out / 'table.md')
        return text

    # ---- parts ----

    def parts(self) -> None:
        """Each part in its share of the time, and then, in what is left of all, those that had too little."""
        done = {(row['part'], row['case']) for row in self.rows if row.get('end')}
        todo = {}
        for part in self.args.parts:
            todo[part] = [case for case in plan.of(part, self.args.tiny) if (part, case['name']) not in done]
        for last in (False, True):
            for number, part in enumerate(self.args.parts):
                left = self.deadline - time.monotonic()
                share = 1 if last else PARTS[part] / sum(PARTS[p] for p in self.args.parts[number:])
                todo[part] = self.work(part, todo[part], time.monotonic() + share * left)
                self.save_table()
        for part, left_over in todo.items():
            for case in left_over:
                self.write(part, case, status='not run')

    def work(self, part: str, todo: list[dict], until: float) -> list[dict]:
        """Cases until the time is up; returns those that were not begun, or not finished by then."""
        while todo and time.monotonic() < until:
            env = todo[0].get('env', {})
            batch = list(takewhile(lambda case, env=env: case.get('env', {}) == env, todo))
            finished = self.process(part, batch, env, until)
            todo = todo[finished:]
            if not finished:
                break
        return todo

    def process(self, part: str, batch: list[dict], env: dict, until: float) -> int:
        """One process over as many of the cases as it lives to see; returns how many need not be run again."""
        log = self.out / f'{part}.log'
        reading, writing = os.pipe()
        command = [sys.executable, str(Path(__file__).with_name('worker.py')), part, '--device', self.args.device, '--report', str(writing)]
        command += ['--scratch', str(self.scratch)]
        command += ['--tiny'] if self.args.tiny else []
        with log.open('ab') as output:
            self.child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[writing],
                start_new_session=True,
                env={**os.environ, 'PYTHONUNBUFFERED': '1', **env},
            )
        os.close(writing)
        with os.fdopen(reading, 'rb', buffering=0) as pipe:
            try:
                self.child.stdin.write(json.dumps(batch).encode())
                self.child.stdin.close()
            except BrokenPipeError:
                pass
            finished, current, began, limit = 0, None, 0.0, time.monotonic() + START_LIMIT
            why = None
            messages = Messages(pipe)
            while (message := messages.next(min(limit, until))) is not Messages.END:
                if message is None:
                    why = 'no time' if time.monotonic() >= until else 'took too long'
                    break
                if 'start' in message:
                    current, began = batch[message['start']], time.time()
                    self.rows = [row for row in self.rows if (row['part'], row['case']) != (part, current['name'])]  # of a first, short try
                    limit = time.monotonic() + current.get('limit', 120)
                elif 'row' in message:
                    self.write(part, current or batch[0], **message['row'], **self.clocks.between(began, time.time()))
                elif 'end' in message:
                    finished, current = message['end'] + 1, None
                    limit = time.monotonic() + START_LIMIT
            code = self.kill(patience=0 if why else 10)
        if why == 'no time':
            return finished
        if current is not None:
            self.fail(part, current, why or f'the process ended with {code}: {_tail(log)}')
            return finished + 1
        if finished == 0:  # not even the first case: none of them would do better
            self.fail(part, {'name': 'start'}, why or f'the process ended with {code}: {_tail(log)}')
        return finished

    def kill(self, patience: float = 0) -> int | None:
        """End the part's process, and all that it has started."""
        child, self.child = self.child, None
        if child is None:
            return None
        try:
            return child.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return child.wait()


class Messages:
    """What a process reports, one JSON value a line."""

    END = object()

    def __init__(self, pipe):
        self.pipe, self.buffer = pipe, b''
        self.selector = selectors.DefaultSelector()
        self.selector.register(pipe, selectors.EVENT_READ)

    def next(self, limit: float):
        """The next message, None if there is none until then, END when the process is gone."""
        while b'\n' not in self.buffer:
            if not self.selector.select(timeout=max(0.0, limit - time.monotonic())):
                return None
            data = self.pipe.read(65536)
            if not data:
                return self.END
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b'\n')
        return json.loads(line)


def _read_rows(file: Path) -> list[dict]:
    """Of the cases that an earlier run has finished."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off
            continue
    done = {(row['part'], row['case']) for row in rows if row.get('end')}
    rows = [row for row in rows if (row['part'], row['case']) in done]
    if file.exists():
        file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return rows


def _tail(log: Path) -> str:
    """The last words of the case that the process was at."""
    with log.open('rb') as file:
        file.seek(max(0, log.stat().st_size - 4000))
        text = file.read().decode(errors='replace')
    _, begun, after = text.rpartition('\n---- ')
    words = after.partition('\n')[2] if begun else text
    return ' '.join(words.split())[-LAST_WORDS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=25)
    parser.add_argument('--out', required=True, metavar='DIR')
    parser.add_argument('--parts', nargs='+', choices=list(PARTS), default=list(PARTS), metavar='PART', help=', '.join(PARTS))
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    parser.add_argument('--tiny', action='store_true', help='small sizes: a dry run')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('first_hour.py: ended from outside'))
    run = Run(args)
    try:
        run.parts()
    finally:
        run.kill()
        run.clocks.stop()
        shutil.rmtree(run.scratch, ignore_errors=True)
        print(run.save_table(), flush=True)


if __name__ == '__main__':
    main()
