"""Seconds of each step in which the student waits, and seconds per step, of one or more checkouts of the plugin, on a CPU.

    python benchmarks/training/waiting.py --plugin OTHER_CHECKOUT --plugin . --out benchmarks/training/waiting.csv

The student waits from the end of one backward pass to the start of its next forward: for rows to be read and encoded, for answers, for the
teacher, and for the optimizer, whose seconds are given as well. `wait_timer.py` takes the time without a look into the plugin.

Responses of the dataset with a local teacher; with vLLM as a teacher server, through a proxy that keeps each reply back for 50 ms; answers
of the student by transformers; and rows of two large images with a small vision model, whose encoding weighs as much as their step. Rows
are read and encoded by the trainer (no workers) or by ms-swift's default, one worker process.

Two floors for the teacher server. In one the proxy answers repeated questions from memory at once: the same step, with requests that take
nothing but their sending and parsing. In the other nobody is asked: cross-entropy alone. The server itself computes on the machine that
trains, which one for GPUs would not; so there is also a proxy that answers from memory after 50 ms. It learns the replies in a run that is
not counted.

`cpu_seconds_per_step` are those that the training process used of a core. Others on the machine change them less than the rest.

Each mode is one run of `swift rlhf`; modes and checkouts take turns `--repeats` times, and medians over all steps but the first two are
reported.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / 'tests'
sys.path[:0] = [str(HERE), str(TESTS), str(TESTS / 'engine')]

import helpers  # noqa: E402
import serving  # noqa: E402
import tiny_vision  # noqa: E402
from modes import make_models  # noqa: E402
from proxy import KEY, send  # noqa: E402

WARM_UP = 2
LATENCY = 0.05
IMAGE = 512  # pixels on a side: 256 tokens
WORKERS = {'no workers': 0, 'default workers': None}
WITHOUT_REQUEST = 'server, from memory, 0 ms'


class Proxy(ThreadingHTTPServer):
    """Keeps the replies of ``upstream`` back.

    Attributes:
        latency: Seconds.
        remembers: Whether a question that was asked before goes no further.
    """

    daemon_threads = True

    def __init__(self, upstream: str):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.upstream, self.latency, self.remembers = upstream, 0.0, False
        self.replies: dict[tuple[str, bytes | None], bytes] = {}
        self.url = f'http://127.0.0.1:{self.server_address[1]}'
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # or a kept connection takes 40 ms more
    server: Proxy

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        self._reply(self.rfile.read(int(self.headers['Content-Length'])))

    def _reply(self, body: bytes | None) -> None:
        server, status = self.server, 200
        content = server.replies.get((self.path, body)) if server.remembers else None
        if content is None:
            headers = {name: self.headers[name] for name in ('Content-Type', 'Authorization') if self.headers[name]}
            request = urllib.request.Request(server.upstream + self.path, data=body, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    content = server.replies[self.path, body] = reply.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
        time.sleep(server.latency)
        send(self, status, content)


@contextmanager
def teacher_server(model: Path, directory: Path):
    with serving.vllm_serve(model, directory) as url:
        proxy = Proxy(url)
        try:
            yield proxy
        finally:
            proxy.shutdown()
            proxy.server_close()


def make_rows(path: Path, sums: int) -> None:
    """Answers of about 20 tokens per sum."""
    draw = random.Random(0)
    rows = []
    for _ in range(96):
        numbers = [(draw.randrange(100), draw.randrange(100)) for _ in range(draw.randint(1, sums))]
        question = {'role': 'user', 'content': ' '.join(f'what is {a} plus {b} ?' for a, b in numbers)}
        rows.append({'messages': [question, {'role': 'assistant', 'content': ' '.join(f'{a} plus {b} is {a + b} .' for a, b in numbers)}]})
    helpers.write_rows(path, rows)


def make_images(directory: Path) -> helpers.TinyModels:
    """Vision models and rows of two JPEG files each. In processes that have torchvision."""
    directory.mkdir()
    environment = tiny_vision.environment()
    for program in ([TESTS / 'tiny_vision.py', directory], ['-c', _PHOTOS, directory, str(IMAGE)]):
        returncode, output = helpers.run([sys.executable, *program], env=environment, cwd=directory)
        if returncode:
            sys.exit(output)
    for name in ('student', 'teacher'):
        path = directory / name / 'processor_config.json'
        processor = json.loads(path.read_text())
        processor['image_processor']['size'] = {'shortest_edge': 32 * 32, 'longest_edge': IMAGE * IMAGE}
        path.write_text(json.dumps(processor))
    rows = []
    for number in range(64):
        images = [str(directory / f'photo-{number}-{place}.jpg') for place in range(2)]
        question = {'role': 'user', 'content': '<image><image>what colour is the square ?'}
        rows.append({'messages': [question, {'role': 'assistant', 'content': 'the square is red . ' * 4}], 'images': images})
    helpers.write_rows(directory / 'rows.jsonl', rows)
    return helpers.TinyModels(directory / 'student', directory / 'teacher', directory / 'rows.jsonl', directory / 'val.jsonl')


_PHOTOS = """
import sys
import numpy as np
from PIL import Image
directory, size = sys.argv[1], int(sys.argv[2])
draw = np.random.default_rng(0)
for number in range(64):
    for place in range(2):
        coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.BICUBIC).save(f'{directory}/photo-{number}-{place}.jpg', quality=90)
"""


def modes(text: helpers.TinyModels, vision: helpers.TinyModels, tokens: int) -> dict[str, tuple[dict, float | None, bool]]:
    """name: (options, latency of the teacher server or None without one, whether it answers from memory)."""
    base = {'tuner_type': 'full', 'learning_rate': 1e-4, 'gkd_logits_topk': 16, 'max_length': 512, 'lmbda': 0}
    base |= {'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 4}
    local = {**text.with_teacher, **base}
    server = {**text.options, **base, 'dataloader_num_workers': None}
    images = {
        **base,
        **vision.with_teacher,
        'model_type': 'qwen3_vl',
        'teacher_model_type': 'qwen3_vl',
        'template': 'qwen3_vl',
        'max_length': 2048,
        'per_device_train_batch_size': 1,
        'gradient_accumulation_steps': 8,
    }
    nobody = {'teacher_model': None, 'teacher_model_type': None, 'gkd_logits_topk': None, 'gkd_loss_weight': 0, 'sft_alpha': 1}
    found = {'local teacher': ({**local, 'dataloader_num_workers': None}, None, False)}
    found['server, 50 ms'] = server, LATENCY, False
    found['server, from memory, 50 ms'] = server, LATENCY, True
    found[WITHOUT_REQUEST] = server, 0.0, True
    found['no teacher'] = {**server, **nobody}, None, False
    on_policy = {'lmbda': 1, 'max_completion_length': tokens, 'temperature': 1, 'dataloader_num_workers': None}
    found['on-policy, local teacher'] = {**local, **on_policy}, None, False
    for name, workers in WORKERS.items():
        found[f'images, local teacher, {name}'] = {**images, 'dataloader_num_workers': workers}, None, False
    found['images, no teacher, default workers'] = {**images, **nobody, 'dataloader_num_workers': None}, None, False
    return found


def run(root: Path, plugin: Path, options: dict, proxy: Proxy, latency: float | None, remembers: bool, steps: int) -> list[dict]:
    output_dir = Path(tempfile.mkdtemp(dir=root))
    proxy.latency, proxy.remembers = latency or 0.0, remembers
    if latency is not None:
        options = {**options, 'teacher_model_server': proxy.url}
    options = {
        **helpers.QUICK,
        'rlhf_type': 'gkd',
        'max_steps': steps,
        'output_dir': output_dir,
        'external_plugins': HERE / 'wait_timer.py',
        'callbacks': 'wait_timer',
        **options,
    }
    vision = tiny_vision.environment() if options['template'] == 'qwen3_vl' else {}
    path = ':'.join(filter(None, [str(plugin), vision.get('PYTHONPATH')]))
    returncode, output = helpers.run(
        [helpers.SCRIPTS / 'swift', 'rlhf', *helpers.command_line(options)],
        env={**vision, 'IMAGE_MAX_TOKEN_NUM': str((IMAGE // 32) ** 2), 'PYTHONPATH': path, 'GKD_TEACHER_API_KEY': KEY},
        cwd=root,
        timeout=1200,
    )
    if returncode:
        sys.exit(f'{options}:\n{output[-6000:]}')
    found = json.loads((output_dir / 'waits.json').read_text())
    if plugin not in Path(found['plugin']).parents:
        sys.exit(f'{found["plugin"]} was loaded, not that of {plugin}')
    return found['steps']


def commit(plugin: Path) -> str:
    return subprocess.run(['git', '-C', plugin, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plugin', type=Path, action='append', help='a checkout of the plugin; default this one')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--tokens', type=int, default=32, help="of the student's answers")
    parser.add_argument('--sums', type=int, default=8, help='at most so many sums in an answer of the dataset')
    parser.add_argument('--student', type=int, default=256, help='hidden size')
    parser.add_argument('--teacher', type=int, default=384, help='hidden size')
    parser.add_argument('--only', default='', help='measure the modes whose name has this in it')
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    plugins = {commit(path): path.resolve() for path in args.plugin or [HERE.parents[1]]}
    root = Path(tempfile.mkdtemp())
    text, vision = make_models(root / 'models', args.student, args.teacher), make_images(root / 'vision')
    make_rows(text.train, args.sums)
    steps: dict[tuple[str, str], list[dict]] = {}
    with teacher_server(text.teacher, root) as proxy:
        for repeat in range(args.repeats):
            for mode, (options, latency, remembers) in modes(text, vision, args.tokens).items():
                if args.only not in mode:
                    continue
                if remembers and not proxy.replies:
                    run(root, next(iter(plugins.values())), options, proxy, latency, remembers, args.steps)
                for name, plugin in plugins.items():
                    found = run(root, plugin, options, proxy, latency, remembers, args.steps)
                    steps.setdefault((mode, name), []).extend(found[WARM_UP:])
                    print(repeat, mode, name, summary(steps[mode, name]), flush=True)
            write(args.out, steps)


def write(path: Path, steps: dict[tuple[str, str], list[dict]]) -> None:
    rows = {key: summary(found) for key, found in steps.items()}
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['mode', 'plugin', 'steps', *next(iter(rows.values())), 'ratio_to_no_request'])
        for (mode, name), row in rows.items():
            floor = rows.get((WITHOUT_REQUEST, name), {}).get('seconds_per_step')
            ratio = round(row['seconds_per_step'] / floor, 3) if floor and mode.startswith('server') else None
            writer.writerow([mode, name, len(steps[mode, name]), *row.values(), ratio])


def summary(steps: list[dict]) -> dict[str, float]:
    """Medians over steps; ``waits_before_first`` has ``update`` in it, and ``waits_before_others`` are of single micro-batches."""
    median = statistics.median
    found = {
        'seconds_per_step': median(step['seconds'] for step in steps),
        'cpu_seconds_per_step': median(step['cpu'] for step in steps),
        'waits_per_step': median(sum(step['waits']) for step in steps),
        'waits_before_first': median(step['waits'][0] for step in steps),
        'waits_before_others': median(wait for step in steps for wait in step['waits'][1:]),
        'update': median(step['update'] for step in steps),
        'teacher': median(step['teacher'] for step in steps),
        'teacher_forwards': median(step['looks'] for step in steps),
    }
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == '__main__':
    main()
