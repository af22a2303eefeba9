"""What rewards add to distillation, and distillation to rewards: held-out accuracy over the updates, on a task made on the spot.

    python benchmarks/rewards/run.py              three seeds; runs that are finished are not run again
    python benchmarks/rewards/run.py --smoke      a few updates of each, to see that it runs; nothing of the repository is overwritten

The task is to sort six letters (sorting.py); the reward is 1 for an answer that is right as a whole (reward.py). For each seed a teacher
and a weaker, smaller student are trained on right answers until they give them so often (TEACHER, STUDENT), and no better. Then four runs
of `swift rlhf --rlhf_type gkd` begin with this student, with the same prompts, updates, optimizer and options but for the two weights:

    distillation    reverse KL on the student's own answers; rewards are measured only
    rewards         no teacher is asked
    both            in one loss, from the first update on
    in turn         distillation for the first half of the run, rewards for the second (--gkd_rl_schedule switch)

Accuracy is that of answers sampled at temperature 1, as in training, to problems that nobody was trained on: eval_reward of ms-swift's log.
Greedy accuracy is measured before and after each run.

What was chosen by hand, after short runs with seed 100: the size of the task, the prompts of an update, one learning rate and its schedule
for all runs, and one --gkd_rl_weight for all that have rewards. Nothing was chosen for one mode alone, but the schedule and the weight were
looked at in runs of `both` only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import sorting

HERE = Path(__file__).resolve().parent
TRAINING_ROWS = 8000

TEACHER = {'shape': {'hidden': 96, 'layers': 3, 'heads': 3}, 'until': 0.75}
STUDENT = {'shape': {'hidden': 64, 'layers': 2, 'heads': 2}, 'until': 0.10}

MODES: dict[str, dict[str, Any]] = {
    'distillation': {'gkd_rl_weight': 0},
    'rewards': {'gkd_loss_weight': 0},
    'both': {},
    'in turn': {'gkd_rl_schedule': 'switch'},
}
COLUMNS = ('mode', 'seed', 'step', 'accuracy', 'greedy_accuracy', 'divergence', 'teacher_accuracy', 'teacher_greedy_accuracy')
COLOURS = dict(zip(MODES, ('#4878a8', '#c8803a', '#3a8a52', '#8a5a9e'), strict=True))


def options(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What all modes have in common."""
    return {
        'rlhf_type': 'gkd',
        'model_type': 'qwen3',
        'teacher_model_type': 'qwen3',
        'template': 'chatml',
        'tuner_type': 'full',
        'torch_dtype': 'float32',
        'fp16': 'false',
        'bf16': 'false',
        'use_cpu': 'true',
        'external_plugins': HERE / 'reward.py',
        'reward_funcs': 'exact',
        'gkd_rl_weight': args.rl_weight,
        'lmbda': 1,
        'gkd_num_samples': 8,
        'gkd_divergence': 'reverse_kl',
        'temperature': 1,
        'max_length': 64,
        'max_completion_length': sorting.LENGTH + 3,
        'per_device_train_batch_size': 8 * args.prompts,
        'gradient_accumulation_steps': 1,
        'learning_rate': args.learning_rate,
        'lr_scheduler_type': 'cosine',
        'warmup_ratio': 0.05,
        'max_steps': args.updates,
        'seed': seed,
        'data_seed': seed,
        'gkd_eval_source': 'student',
        'per_device_eval_batch_size': 350,
        'eval_strategy': 'steps',
        'eval_steps': args.updates // args.points,
        'eval_on_start': 'true',
        'save_strategy': 'steps',
        'save_steps': args.updates,
        'save_only_model': 'true',
        'logging_steps': 5,
        'gradient_checkpointing': 'false',
        'split_dataset_ratio': 0,
        'report_to': 'none',
        'add_version': 'false',
        'check_model': 'false',
        'load_from_cache_file': 'false',
        'dataset_num_proc': 1,
        'dataloader_num_workers': 0,
    }


class Bench:
    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.start = args, work, time.monotonic()

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self.start)
        print(f'[{seconds // 60:2d}:{seconds % 60:02d}] {text}', flush=True)

    def of_seed(self, seed: int) -> list[dict[str, Any]]:
        """Rows of the CSV file."""
        import torch
        from pretraining import Sorter, pretrain

        work = self.work / f'seed_{seed}'
        work.mkdir(parents=True, exist_ok=True)
        # Pre-training draws with seeds of its own; of 17 million problems it sees some 10,000, so hardly one of these.
        problems = sorting.problems(1000 + seed)
        held_out = list(islice(problems, self.args.held_out))
        data = {'val_dataset': held_out, 'dataset': list(islice(problems, TRAINING_ROWS))}
        for name, letters in data.items():
            (work / f'{name}.jsonl').write_text(''.join(json.dumps(sorting.row(one)) + '\n' for one in letters))
        for number, (name, model) in enumerate((('teacher', TEACHER), ('student', STUDENT))):
            if not (work / name).exists():
                updates = pretrain(work / name, model['shape'], 2 * seed + number, model['until'], self.args.pretraining)
                self.say(f'seed {seed}: {name} trained for {updates} updates')
        teacher, student = Sorter(work / 'teacher'), Sorter(work / 'student')
        torch.manual_seed(seed)  # also where nothing had to be trained
        of_teacher = {
            'teacher_accuracy': teacher.accuracy(4 * held_out),  # what all others are compared with
            'teacher_greedy_accuracy': teacher.accuracy(held_out, greedy=True),
        }
        self.say(f'seed {seed}: the teacher solves {of_teacher["teacher_accuracy"]:.1%}, the student {student.accuracy(held_out):.1%}')
        rows = []
        for mode in self.args.modes:
            folder, points = self.run(work, mode, seed)
            last = Sorter(folder / f'checkpoint-{self.args.updates}')
            greedy = {0: student.accuracy(held_out, greedy=True), self.args.updates: last.accuracy(held_out, greedy=True)}
            for step, accuracy, divergence in points:
                row = {'mode': mode, 'seed': seed, 'step': step, 'accuracy': accuracy, 'divergence': divergence}
                rows.append({**row, 'greedy_accuracy': greedy.get(step), **of_teacher})
            self.say(f'seed {seed}, {mode}: {points[0][1]:.1%} to {points[-1][1]:.1%}, greedily {greedy[self.args.updates]:.1%}')
        return rows

    def run(self, work: Path, mode: str, seed: int) -> tuple[Path, list[tuple[int, float, float | None]]]:
        """``swift rlhf``, unless it is finished: its folder, and of each evaluation the step, the accuracy and the divergence."""
        folder = work / mode.replace(' ', '_')
        paths = {name: work / f'{name}.jsonl' for name in ('dataset', 'val_dataset')}
        paths |= {'model': work / 'student', 'teacher_model': work / 'teacher', 'output_dir': folder}
        argv = [Path(sys.executable).with_name('swift'), 'rlhf']
        for name, value in {**options(self.args, seed), **paths, **MODES[mode]}.items():
            argv += [f'--{name}', value]
        argv = [str(one) for one in argv]
        finished = folder / 'finished.json'
        if not finished.exists() or json.loads(finished.read_text()) != argv:
            folder.mkdir(exist_ok=True)
            (folder / 'logging.jsonl').unlink(missing_ok=True)
            with (folder / 'output.log').open('w') as log:
                # One thread: with models this small, several wait for one another longer than they work.
                offline = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': '1'}
                done = subprocess.run(argv, env={**os.environ, **offline}, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.exit(f'{mode}, seed {seed}: {folder / "output.log"} says why it failed.')
            finished.write_text(json.dumps(argv))
        logged = [json.loads(line) for line in (folder / 'logging.jsonl').read_text().splitlines()]
        return folder, [
            (int(row['global_step/max_steps'].split('/')[0]), row['eval_reward'], row.get('eval_divergence'))
            for row in logged
            if 'eval_reward' in row
        ]


def spread(values: Iterable[float]) -> str:
    values = sorted(100 * value for value in values)
    return f'{statistics.mean(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})'


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the smallest and the largest, in percent and points."""
    last = max(row['step'] for row in rows)
    third = min({row['step'] for row in rows}, key=lambda step: abs(step - last / 3))
    lines = [
        f'| | update {third} | update {last} | beyond the teacher | greedy, update {last} | reverse KL, update {last} |',
        '|---|---|---|---|---|---|',
    ]
    of_seeds = list({row['seed']: row for row in rows}.values())
    teacher = [spread(row[name] for row in of_seeds) for name in ('teacher_accuracy', 'teacher_greedy_accuracy')]
    lines.append(f'| teacher | {teacher[0]} | {teacher[0]} | | {teacher[1]} | 0 |')
    before = [row for row in rows if row['step'] == 0 and row['mode'] == rows[0]['mode']]
    lines.append(
        f'| student before | {spread(row["accuracy"] for row in before)} | | | {spread(row["greedy_accuracy"] for row in before)} | |'
    )
    for mode in dict.fromkeys(row['mode'] for row in rows):
        early, end = ([row for row in rows if row['mode'] == mode and row['step'] == step] for step in (third, last))
        beyond = spread(row['accuracy'] - row['teacher_accuracy'] for row in end)
        divergences = [row['divergence'] for row in end if row['divergence'] is not None]
        divergence = f'{statistics.mean(divergences):.3f}' if divergences else ''
        accuracies = [spread(row['accuracy'] for row in part) for part in (early, end)]
        lines.append(f'| {mode} | {" | ".join(accuracies)} | {beyond} | {spread(row["greedy_accuracy"] for row in end)} | {divergence} |')
    return '\n'.join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for mode in dict.fromkeys(row['mode'] for row in rows):
        steps = sorted({row['step'] for row in rows})
        seeds = [[100 * row['accuracy'] for row in rows if row['mode'] == mode and row['step'] == step] for step in steps]
        axis.plot(steps, [statistics.mean(values) for values in seeds], label=mode, color=COLOURS[mode])
        axis.fill_between(
            steps, [min(values) for values in seeds], [max(values) for values in seeds], color=COLOURS[mode], alpha=0.15, lw=0
        )
    teachers = [100 * row['teacher_accuracy'] for row in {row['seed']: row for row in rows}.values()]
    axis.axhline(statistics.mean(teachers), color='#555555', ls='--', label='teacher')
    axis.axhspan(min(teachers), max(teachers), color='#555555', alpha=0.1, lw=0)
    axis.set_xlabel('updates')
    axis.set_ylabel('held-out problems solved, %')
    axis.set_ylim(0, 100)
    axis.legend(frameon=False)
    axis.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3, help='how many')
    parser.add_argument('--first_seed', type=int, default=1)
    parser.add_argument('--updates', type=int, default=240)
    parser.add_argument('--points', type=int, default=12, help='evaluations of a run, the one before it left out')
    parser.add_argument('--prompts', type=int, default=32, help='of an update, each with 8 answers')
    parser.add_argument('--held_out', type=int, default=700, help='problems; a share of one half of 700 has a standard error of 1.9 points')
    parser.add_argument('--pretraining', type=int, default=5000, help='updates, if a model has not become good enough before')
    parser.add_argument('--learning_rate', type=float, default=1e-3)
    parser.add_argument('--rl_weight', type=float, default=1.0)
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES))
    parser.add_argument('--work', type=Path, default=Path('output/benchmark_rewards'), help='models, data and runs (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=HERE, help='where curves.csv and curves.png go (default: beside this file)')
    parser.add_argument('--smoke', action='store_true', help='two updates of each mode and one seed, all of it below --work')
    args = parser.parse_args()
    work = args.work.resolve()
    if args.smoke:
        work = args.out = work / 'smoke'
        args.seeds, args.updates, args.points, args.held_out, args.pretraining = 1, 2, 2, 20, 2
    bench = Bench(args, work)
    rows = [row for seed in range(args.first_seed, args.first_seed + args.seeds) for row in bench.of_seed(seed)]
    with (args.out / 'curves.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in rows)
    plot(rows, args.out / 'curves.png')
    bench.say('done\n')
    print(table(rows))


if __name__ == '__main__':
    main()
