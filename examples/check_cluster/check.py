"""Does it run on these GPUs? Short runs of `swift rlhf` and `megatron rlhf` with tiny random models, each judged by its numbers.

    bash examples/check_cluster.sh                        all that these GPUs, and what is installed, allow
    bash examples/check_cluster.sh --gpus 2               the first two of them; --gpus 4,5 names them
    bash examples/check_cluster.sh --only 'ZeRO*' 'TP 2'  some configurations, and those that they are compared with
    bash examples/check_cluster.sh --list                 all of them, with their options
    bash examples/check_cluster.sh --dry                  on a CPU: what can be run there; the other command lines are only parsed

No network is used and no model is needed. A line for each configuration says whether it passed, failed and why, the seconds and the memory
that the rank with the most has reserved. DIR, by default check_cluster_output, gets table.md, results.jsonl and a directory for each
configuration with the command and all that it has said. The exit status is 1 if something has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from judging import Run, bound, difference, finite, gib, last_words, missing_module
from matrix import ENGINE_MEMORY, MATRIX, Configuration, Made, arguments, dtype_of, readable, words
from running import Processes, free_port

HERE = Path(__file__).resolve().parent
LAUNCHERS = {'swift': (sys.executable, '-m', 'swift.cli.main'), 'megatron': (sys.executable, '-m', 'swift.cli._megatron.main')}
DRY_RANKS = 2

# Nothing is looked for on a hub, and nothing waits for one.
OFFLINE = {
    'HF_HUB_OFFLINE': '1',
    'HF_DATASETS_OFFLINE': '1',
    'TRANSFORMERS_OFFLINE': '1',
    'USE_HF': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'VLLM_NO_USAGE_STATS': '1',
    'SPT_NOENV': '1',  # vLLM's processes keep the environment by which they are found
    'PYTHONUNBUFFERED': '1',
}


@dataclass(frozen=True)
class Outcome:
    """A line of the table. ``status`` is passed, failed, parses (dry runs only), or why it was not run."""

    name: str
    gpus: int
    status: str
    why: str = ''
    seconds: Optional[float] = None
    peak: Optional[int] = None

    def __str__(self) -> str:
        seconds = '' if self.seconds is None else f'{self.seconds:.0f} s'
        peak = '' if self.peak is None else gib(self.peak)
        return f'{self.status:<14} {self.name:<44} {self.gpus} GPU{"s" * (self.gpus > 1):<1} {seconds:>6} {peak:>10}  {self.why}'.rstrip()


class Matrix:
    """Runs configurations one after another.

    Args:
        gpus: As CUDA_VISIBLE_DEVICES names them; None for a dry run.
        ranks: Of a dry run.
        limit: Seconds that a configuration may take, its server's start included.
        capability: CUDA's compute capability of the GPUs, if it is known.
    """

    def __init__(
        self, directory: Path, gpus: Optional[list[str]], ranks: int = DRY_RANKS, limit: float = 300, capability: Optional[float] = None
    ):
        self.directory, self.gpus, self.limit, self.capability = directory, gpus, limit, capability
        self.available = ranks if gpus is None else len(gpus)
        self.inputs = directory / 'inputs'
        self.outcomes: dict[str, Outcome] = {}
        self.runs: dict[str, Run] = {}

    @property
    def on_gpus(self) -> bool:
        return self.gpus is not None

    def make_inputs(self) -> None:
        """Once for a directory, and anew where another version of the scripts would make others."""
        scripts = (HERE / 'inputs.py', *(HERE.parent / 'quickstart' / name for name in ('models.py', 'task.py')))
        made, version = self.inputs / 'made', hashlib.sha256(b''.join(script.read_bytes() for script in scripts)).hexdigest()
        if not made.exists() or made.read_text() != version:
            shutil.rmtree(self.inputs, ignore_errors=True)
            self.inputs.mkdir(parents=True)
            log = self.directory / 'inputs.log'
            with log.open('w') as output:
                argv = [sys.executable, str(HERE / 'inputs.py'), str(self.inputs)]
                done = subprocess.run(argv, env={**os.environ, **OFFLINE}, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.exit(f'check_cluster: the models could not be made: {last_words(log.read_text())} (all of it is in {log})')
            made.write_text(version)

    # ---- one configuration ----

    def obstacle(self, configuration: Configuration) -> Optional[tuple[str, str]]:
        """Why it is not run, as a status and more words; None if it is."""
        missing = [package for package in configuration.needs if not installed(package)]
        if missing:
            return 'not installed', ', '.join(missing)
        if not self.on_gpus and configuration.not_on_cpu:
            return 'only on GPUs', configuration.not_on_cpu
        if configuration.gpus > self.available:
            return f'needs {configuration.gpus} GPUs', ''
        if self.capability is not None and configuration.least_capability > self.capability:
            return 'needs others', f'GPUs of compute capability {configuration.least_capability}, here {self.capability}'
        return None

    def check(self, configuration: Configuration) -> Outcome:
        """Run and judge it; nothing that it does keeps the next one from its turn."""
        begin = time.monotonic()
        obstacle = self.obstacle(configuration)
        seconds = peak = None
        if obstacle:
            status, why = obstacle
        else:
            status, why, peak = self.judged(configuration)
            seconds = round(time.monotonic() - begin, 1)
        outcome = Outcome(configuration.name, configuration.gpus, status, why, seconds, peak)
        self.outcomes[configuration.name] = outcome
        return outcome

    def judged(self, configuration: Configuration) -> tuple[str, str, Optional[int]]:
        """Status, reason and peak of a configuration that is run now."""
        teacher = self.inputs / str(arguments(configuration, self.on_gpus)['teacher_model']) / 'model.safetensors'
        run = Run(
            configuration.name,
            self.directory / re.sub(r'\W+', '_', configuration.name).strip('_'),
            self.on_gpus,
            dtype_of(configuration, self.on_gpus),
            teacher.stat().st_size if teacher.exists() else 0,
        )
        shutil.rmtree(run.directory, ignore_errors=True)
        run.directory.mkdir(parents=True)
        try:
            wrong = self.run(configuration, run)
            if wrong and (missing := missing_module(wrong)):
                return 'not installed', missing, run.peak
            wrong = wrong or self.wrong_numbers(configuration, run)
        except Exception as error:  # a log that is cut off, say
            wrong = f'{type(error).__name__}: {error}'
        if wrong:
            return 'failed', ' '.join(wrong.split()), run.peak
        self.runs[configuration.name] = run
        return 'passed', self.remark(configuration, run), run.peak

    def run(self, configuration: Configuration, run: Run) -> Optional[str]:
        """Returns what went wrong with the command itself."""
        until = time.monotonic() + self.limit
        devices = (self.gpus or [])[: configuration.gpus]
        given = {'port': free_port(), 'group_port': free_port(), 'dtype': run.dtype, 'engine_memory': ENGINE_MEMORY[self.on_gpus]}
        with Processes(self.environment(configuration, run, devices)) as processes:
            if configuration.server:
                argv = self.filled(configuration.server, given)
                argv = [*LAUNCHERS['swift'], *argv[1:]] if argv[0] == 'swift' else argv
                last, server = {'CUDA_VISIBLE_DEVICES': ','.join(devices[-1:])}, run.directory / 'server.log'
                if not processes.serve(argv, server, given['port'], until, last):
                    return f'no server: {last_words(server.read_text(errors="replace"))}'
            argv = [*LAUNCHERS[configuration.command], 'rlhf', *self.command_line(configuration, run.directory, given, self.on_gpus)]
            (run.directory / 'command.txt').write_text(shlex.join(argv) + '\n')
            command = processes.start(argv, run.directory / 'output.log')
            try:
                status = command.wait(max(until - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                return f'no end after {self.limit:.0f} s; last line: {(run.output.splitlines() or [""])[-1][-120:]}'
        if status:
            return f'{last_words(run.output)} (exit status {status})'
        if 'of swift-gkd-plugin' not in run.output:
            return 'stock ms-swift has trained: the plugin is not installed in this environment, or SWIFT_GKD_PLUGIN switches it off'
        return None

    def command_line(self, configuration: Configuration, output: Path, given: dict[str, Any], on_gpus: bool = True) -> list[str]:
        """What follows `swift rlhf` or `megatron rlhf`."""
        return self.filled(words({**arguments(configuration, on_gpus), 'output_dir': output}), given)

    def filled(self, words, given: dict[str, Any]) -> list[str]:
        found = []
        for word in words:
            text = str(self.inputs / word) if isinstance(word, Made) else str(word)
            for name, value in given.items():
                text = text.replace(f'{{{name}}}', str(value))
            found.append(text)
        return found

    def environment(self, configuration: Configuration, run: Run, devices: list[str]) -> dict[str, str]:
        env = {**OFFLINE, 'CHECK_CLUSTER_OUT': str(run.directory), 'MASTER_ADDR': '127.0.0.1'}
        env['CUDA_VISIBLE_DEVICES'] = ','.join(devices[: configuration.gpus if configuration.one_process else configuration.ranks])
        if not self.on_gpus:
            env |= {'DS_ACCELERATOR': 'cpu', 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')}
        if configuration.torchrun:
            env |= {'NPROC_PER_NODE': str(configuration.ranks), 'MASTER_PORT': str(free_port())}
        return env | dict(configuration.env)

    def wrong_numbers(self, configuration: Configuration, run: Run) -> Optional[str]:
        other = None
        if configuration.like:
            other = self.runs.get(configuration.like)
            if other is None:
                return f'it runs, but there is nothing to compare it with: {configuration.like}: {self.outcomes[configuration.like].status}'
        wrong = finite(run)
        if wrong is None and other is not None:
            off, allowed = difference(run, other, configuration.within), bound(run, other, configuration.within)
            if not off <= allowed:
                losses = f'losses {run.losses} and {other.losses}'
                wrong = f'{off:.1e} off {other.name}, {allowed:g} allowed; {losses}'
        for check in configuration.checks:
            wrong = wrong or check(run, other)
        return wrong

    def remark(self, configuration: Configuration, run: Run) -> str:
        if configuration.like is None:
            return f'loss {run.losses[0]:.4g} to {run.losses[-1]:.4g}'
        off = difference(run, self.runs[configuration.like], configuration.within)
        return f'as {configuration.like}: {off:.0e} off'

    # ---- those that a dry run leaves out ----

    def parse(self, configurations: list[Configuration]) -> dict[str, Optional[str]]:
        """What is wrong with command lines that are not run, by name; None for nothing."""
        found: dict[str, Optional[str]] = {}
        for command in LAUNCHERS:
            chosen = [c for c in configurations if c.command == command]
            given = {'port': 1, 'group_port': 1, 'dtype': 'bfloat16', 'engine_memory': ENGINE_MEMORY[True]}
            lines = [(c.ranks, self.command_line(c, self.directory, given)) for c in chosen]
            source, target, log = (self.directory / f'parse-{command}.{end}' for end in ('json', 'found.json', 'log'))
            source.write_text(json.dumps(lines))
            target.unlink(missing_ok=True)
            if chosen:
                argv = [sys.executable, HERE / 'parse.py', command, source, target]
                with log.open('w') as output:
                    subprocess.run(list(map(str, argv)), env={**os.environ, **OFFLINE}, stdout=output, stderr=subprocess.STDOUT)
                said = json.loads(target.read_text()) if target.exists() else [last_words(log.read_text())] * len(chosen)
                found |= dict(zip((c.name for c in chosen), said, strict=True))
        return found

    def parse_what_did_not_run(self, configurations: list[Configuration]) -> None:
        absent = [c for c in configurations if self.outcomes[c.name].seconds is None and all(map(installed, of_its_command(c)))]
        for name, wrong in self.parse(absent).items():
            outcome = self.outcomes[name]
            reason = f'{outcome.status}: {outcome.why}' if outcome.why else outcome.status
            status, why = ('failed', f'{reason}; and its command line is wrong: {wrong}') if wrong else ('parses', reason)
            self.outcomes[name] = Outcome(name, outcome.gpus, status, why)


def of_its_command(configuration: Configuration) -> list[str]:
    """What has to be there to parse its command line."""
    return ['megatron.core', 'mcore_bridge'] if configuration.command == 'megatron' else []


def installed(package: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of a parent
        return importlib.util.find_spec(package) is not None
    return False


def chosen(patterns: Optional[list[str]]) -> list[Configuration]:
    """Those whose names match, and those that they are compared with."""
    if patterns is None:
        return list(MATRIX)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(c.name, pattern) for c in MATRIX):
            sys.exit(f'check_cluster: --only {pattern!r}: no configuration has such a name; --list shows them')
    names = {c.name for c in MATRIX for pattern in patterns if fnmatch.fnmatch(c.name, pattern)}
    for configuration in reversed(MATRIX):
        if configuration.name in names and configuration.like:
            names.add(configuration.like)
    return [c for c in MATRIX if c.name in names]


def visible(given: Optional[str]) -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them.

    Args:
        given: A number of them, or their names with commas; None for all.
    """
    if given and not given.isdigit():
        return given.split(',')
    listed = os.environ.get('CUDA_VISIBLE_DEVICES')
    if listed is None:
        listed = ','.join(nvidia_smi('index'))
    gpus = [name for name in listed.split(',') if name]
    if given and int(given) > len(gpus):
        sys.exit(f'check_cluster: --gpus {given}: there are {len(gpus)}')
    return gpus[: int(given)] if given else gpus


def nvidia_smi(field: str) -> list[str]:
    """Of all GPUs of the machine; nothing where it does not say."""
    with contextlib.suppress(OSError):
        asked = ['nvidia-smi', f'--query-gpu={field}', '--format=csv,noheader']
        done = subprocess.run(asked, capture_output=True, text=True)
        return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return []


def least_capability() -> Optional[float]:
    found = [float(line) for line in nvidia_smi('compute_cap') if re.fullmatch(r'\d+\.\d+', line)]
    return min(found, default=None)


def table(outcomes: list[Outcome]) -> str:
    lines = ['| configuration | GPUs | | seconds | memory | |', '|---|---|---|---|---|---|']
    for outcome in outcomes:
        seconds = '' if outcome.seconds is None else f'{outcome.seconds:.0f}'
        peak = '' if outcome.peak is None else gib(outcome.peak)
        why = outcome.why.replace('|', '\\|')
        lines.append(f'| {outcome.name} | {outcome.gpus} | {outcome.status} | {seconds} | {peak} | {why} |')
    return '\n'.join(lines) + '\n'


def main() -> int:
    parser = argparse.ArgumentParser(prog='check_cluster.sh', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gpus', help='how many, or which, with commas (default: all that are visible); with --dry: ranks')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='configurations; * stands for anything')
    parser.add_argument('--out', type=Path, default=Path('check_cluster_output'), metavar='DIR')
    parser.add_argument('--limit', type=float, default=300, metavar='SECONDS', help='for one configuration (default: %(default)s)')
    parser.add_argument('--dry', action='store_true', help='on a CPU')
    parser.add_argument('--list', action='store_true', help='show the configurations and run nothing')
    args = parser.parse_args()
    configurations = chosen(args.only)
    if args.list:
        for configuration in configurations:
            needs = ', '.join([f'{configuration.gpus} GPU{"s" * (configuration.gpus > 1)}', *configuration.needs])
            print(f'{configuration.name} ({needs})\n    {readable(configuration, not args.dry)}')
        return 0
    gpus = None if args.dry else visible(args.gpus)
    if gpus == []:
        sys.exit('check_cluster: no GPU is visible here; --dry runs on a CPU, --gpus 0,1 names devices that nvidia-smi does not know')
    directory = args.out.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    capability = None if args.dry else least_capability()
    matrix = Matrix(directory, gpus, int(args.gpus or DRY_RANKS) if args.dry else 0, args.limit, capability)
    where = f'{matrix.available} ranks on a CPU' if args.dry else f'GPUs {", ".join(gpus)}'
    print(f'{len(configurations)} configurations on {where}; outputs in {directory}', flush=True)
    matrix.make_inputs()
    status = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, its configuration ends with it
    try:
        for configuration in configurations:
            print(matrix.check(configuration), flush=True)
        if args.dry:
            matrix.parse_what_did_not_run(configurations)
    except KeyboardInterrupt:
        status = 130
    outcomes = list(matrix.outcomes.values())
    (directory / 'results.jsonl').write_text(''.join(json.dumps(asdict(outcome)) + '\n' for outcome in outcomes))
    (directory / 'table.md').write_text(table(outcomes))
    print(f'\n{table(outcomes)}')
    counts = {kind: sum(o.status == kind for o in outcomes) for kind in ('passed', 'failed', 'parses')}
    rest = len(outcomes) - sum(counts.values())
    parsed = f', {counts["parses"]} only parsed' if args.dry else ''
    print(f'{counts["passed"]} passed, {counts["failed"]} failed{parsed}, {rest} not run; {directory / "table.md"}')
    return status or int(counts['failed'] > 0)


if __name__ == '__main__':
    sys.exit(main())
