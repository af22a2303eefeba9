"""Train a small teacher, distil it into a smaller student in four ways with `swift rlhf --rlhf_type gkd`, and compare.

    ./quickstart.sh             everything; phases that are finished are not run again
    ./quickstart.sh --fresh     from the beginning
    ./quickstart.sh --smoke     a few updates per phase, to see that it runs

Every mode starts from the same weak student and has the same number of updates, the same options and the same seeds; only where the
responses come from differs. The numbers in the table come from the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import models
import task

HERE = Path(__file__).parent
HELD_OUT = 300
SEED = 42

# What the distillations have in common, as a user would type it. --temperature 1 samples from the student as it is.
DISTILLATION = {'beta': 0.5, 'temperature': 1.0, 'learning_rate': 1e-3, 'per_device_train_batch_size': 32, 'max_completion_length': 40}
MODES = {
    'dataset only': {'lmbda': 0},
    'seq_kd': {'lmbda': 0, 'seq_kd': 'true'},
    'on-policy': {'lmbda': 1},
    'mixed': {'lmbda': 0.5, 'seq_kd': 'true'},
}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    teacher_steps: int = 1200
    student_steps: int = 150
    updates: int = 200
    rows: int = 8000

    @classmethod
    def smoke(cls) -> Size:
        return cls(teacher_steps=4, student_steps=2, updates=2, rows=256)


class Phases:
    """Runs the phases one after the other, says what is going on, and remembers which are finished."""

    def __init__(self, directory: Path):
        self.directory, self.start = directory, time.monotonic()

    def say(self, text: str, end: str = '\n') -> None:
        seconds = time.monotonic() - self.start
        print(f'\r\033[K[{int(seconds // 60):2d}:{int(seconds % 60):02d}] {text}', end=end, flush=True)

    def swift(self, name: str, command: str, options: dict) -> tuple[Path, float]:
        """Run ``swift <command>``; its output goes to a file beside the checkpoints.

        Returns:
            The last checkpoint and the seconds that the training itself took.
        """
        folder = self.directory / name.replace(' ', '_')
        finished = folder / 'finished.json'
        if finished.exists():
            state = json.loads(finished.read_text())
            self.say(f'{name}: finished before ({state["seconds"]:.0f} s)')
            return folder / state['checkpoint'], state['seconds']
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        options = {
            'model_type': 'qwen3',
            'template': 'chatml',
            'tuner_type': 'full',
            'torch_dtype': 'float32',
            'fp16': 'false',
            'bf16': 'false',
            'use_cpu': 'true',
            'max_length': 128,
            'seed': SEED,
            'lr_scheduler_type': 'cosine',
            'warmup_ratio': 0.05,
            'gradient_checkpointing': 'false',
            'split_dataset_ratio': 0,
            'logging_steps': 10,
            'save_strategy': 'steps',
            'save_steps': options['max_steps'],
            'save_only_model': 'true',
            'report_to': 'none',
            'add_version': 'false',
            'check_model': 'false',
            'load_from_cache_file': 'false',
            'dataset_num_proc': 1,
            'dataloader_num_workers': 0,
            'output_dir': folder,
            **options,
        }
        argv = [Path(sys.executable).with_name('swift'), command]
        for key, value in options.items():
            argv += [f'--{key}', value]
        log = folder / 'output.log'
        self._follow(name, list(map(str, argv)), log)
        seconds = next(row['train_runtime'] for row in _rows(folder / 'logging.jsonl') if 'train_runtime' in row)
        finished.write_text(json.dumps({'checkpoint': f'checkpoint-{options["max_steps"]}', 'seconds': seconds}))
        self.say(f'{name}: {seconds:.0f} s')
        return folder / f'checkpoint-{options["max_steps"]}', seconds

    def _follow(self, name: str, argv: list[str], log: Path) -> None:
        """Run a command and show its last progress line as it comes."""
        # One thread: with models this small, several wait for one another longer than they work.
        environment = {
            'OMP_NUM_THREADS': '1',
            **os.environ,
            'HF_HUB_OFFLINE': '1',
            'TOKENIZERS_PARALLELISM': 'false',
            'PYTHONUNBUFFERED': '1',
        }
        self.say(f'{name}: starting', end='')
        tail: deque[str] = deque(maxlen=15)
        with (
            log.open('w') as file,
            subprocess.Popen(
                argv, env=environment, cwd=log.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace'
            ) as process,
        ):
            for line in process.stdout:
                file.write(line)
                tail.append(line)
                if "'global_step/max_steps'" in line:
                    step = line.split("'global_step/max_steps': '", 1)[1].split("'", 1)[0]
                    loss = line.split("'loss': '", 1)[1].split("'", 1)[0] if "'loss': '" in line else ''
                    self.say(f'{name}: update {step}  loss {loss}', end='')
        if process.returncode:
            self.say(f'{name}: failed with status {process.returncode}. The end of {log}:')
            sys.exit(''.join(tail))


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def score(checkpoint: Path, teacher: Path, held_out: list[task.Problem], batch: int = 100) -> tuple[float, float]:
    """Answer the held-out problems greedily.

    Returns:
        The share solved, and the Jensen-Shannon divergence to the teacher in nats per token, on the model's own answers: in the states
        that it gets itself into.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swift_gkd_plugin.divergence import Divergence, logits_divergence

    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (checkpoint, teacher))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side='left')
    solved, divergence, tokens = 0, 0.0, 0
    for first in range(0, len(held_out), batch):
        part = held_out[first : first + batch]
        prompts = [
            tokenizer.apply_chat_template([{'role': 'user', 'content': p.question}], tokenize=False, add_generation_prompt=True)
            for p in part
        ]
        inputs = tokenizer(prompts, return_tensors='pt', padding=True)
        with torch.no_grad():
            answers = model.generate(**inputs, max_new_tokens=DISTILLATION['max_completion_length'], do_sample=False)
            width = inputs['input_ids'].shape[1]
            solved += sum(p.is_solved_by(tokenizer.decode(a[width:], skip_special_tokens=True)) for p, a in zip(part, answers, strict=True))
            new = answers[:, width:]
            # Up to and with the token that ends the answer; what follows it is padding.
            given = (new == tokenizer.eos_token_id).cumsum(-1).roll(1, -1).index_fill(-1, torch.tensor([0]), 0) == 0
            mask = torch.cat([inputs['attention_mask'], given.long()], -1)
            logits = [m(input_ids=answers, attention_mask=mask).logits[:, width - 1 : -1][given] for m in (model, other)]
        divergence += logits_divergence(*logits, Divergence('jsd', 0.5), reduction='sum').item()
        tokens += int(given.sum())
    return solved / len(held_out), divergence / tokens


def table(rows: list[dict]) -> str:
    lines = ['| model | exact match | divergence to the teacher | seconds |', '|---|---|---|---|']
    for row in rows:
        seconds = '' if row['seconds'] is None else f'{row["seconds"]:.0f}'
        lines.append(f'| {row["model"]} | {row["accuracy"]:.1%} | {row["divergence"]:.4f} | {seconds} |')
    return '\n'.join(lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    names = [row['model'] for row in rows][::-1]
    colours = ['#888888' if row['model'] in ('teacher', 'student before') else '#2a7f9e' for row in rows][::-1]
    for axis, key, title in (
        (left, 'accuracy', 'exact match on held-out problems'),
        (right, 'divergence', 'JSD to the teacher on its own answers, nats per token'),
    ):
        bars = axis.barh(names, [row[key] for row in rows][::-1], color=colours)
        axis.bar_label(bars, fmt='%.3f', padding=3)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('quickstart_output'), help='where everything goes (default: %(default)s)')
    parser.add_argument('--fresh', action='store_true', help='forget what earlier runs have finished')
    parser.add_argument('--smoke', action='store_true', help='a few updates per phase')
    args = parser.parse_args()
    size = Size.smoke() if args.smoke else Size()
    directory = args.output.resolve() / ('smoke' if args.smoke else 'full')
    if args.fresh:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    phases = Phases(directory)

    phases.say(f'{size.rows} problems to train on, {HELD_OUT} others to score with, in {directory}')
    every = task.problems(SEED)
    held_out = list(islice(every, HELD_OUT))
    training = list(islice(every, size.rows))
    draw = random.Random(SEED)
    dataset = write_rows(directory / 'dataset.jsonl', [task.row(p) for p in training])
    teacher_data = write_rows(directory / 'teacher_dataset.jsonl', [task.teacher_row(p, draw) for p in training])
    for name, shape in (('teacher', {'hidden': 128, 'layers': 3, 'heads': 4}), ('student', {'hidden': 32, 'layers': 2, 'heads': 2})):
        if not (directory / f'{name}_init').exists():
            models.make(directory / f'{name}_init', seed=SEED, **shape)

    sft = {'learning_rate': 2e-3, 'per_device_train_batch_size': 64}
    teacher, teacher_seconds = phases.swift(
        'teacher', 'sft', {**sft, 'model': directory / 'teacher_init', 'dataset': teacher_data, 'max_steps': size.teacher_steps}
    )
    student, student_seconds = phases.swift(
        'student', 'sft', {**sft, 'model': directory / 'student_init', 'dataset': dataset, 'max_steps': size.student_steps}
    )
    done = [('teacher', teacher, teacher_seconds), ('student before', student, student_seconds)]
    for mode, options in MODES.items():
        shared = {'rlhf_type': 'gkd', 'model': student, 'teacher_model': teacher, 'teacher_model_type': 'qwen3', 'dataset': dataset}
        done.append((mode, *phases.swift(mode, 'rlhf', {**shared, **DISTILLATION, **options, 'max_steps': size.updates})))

    rows = []
    for name, checkpoint, seconds in done:
        phases.say(f'scoring {name}', end='')
        accuracy, divergence = score(checkpoint, teacher, held_out)
        rows.append({'model': name, 'accuracy': accuracy, 'divergence': divergence, 'seconds': seconds})
    with (directory / 'results.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (directory / 'results.md').write_text(table(rows) + '\n')
    plot(rows, directory / 'results.png')
    phases.say('done\n')
    print(table(rows))
    print(f'\nPlot: {directory / "results.png"}')


if __name__ == '__main__':
    main()
