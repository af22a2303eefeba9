"""Seconds per step of every way to get responses, on the same small models, on a CPU.

    python benchmarks/training/modes.py --out modes.csv

The student's answers by transformers, a colocated vLLM, a `swift rollout` server, and that server one step ahead (`--gkd_prefetch`); the
teacher's by transformers, by a vLLM server, and by a vLLM engine beside the training process (`--gkd_teacher_engine`). The real vLLM for
CPUs runs them, with the same fittings as in the tests. Every process has one thread, so that a server and the training process each have a
core of their own where there are two.

Each mode is one run of `swift rlhf`; the modes take turns `--repeats` times, and the median over all steps but the first ones, which
compile and warm up, is reported. What is compared is the plumbing: on such models a GPU would give other ratios.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parents[1] / 'tests'
sys.path[:0] = [str(TESTS), str(TESTS / 'engine')]

import helpers  # noqa: E402
import serving  # noqa: E402
from engine_options import ENGINE  # noqa: E402
from proxy import KEY  # noqa: E402
from rollout_server import ENVIRONMENT, RolloutServer  # noqa: E402

WARM_UP = 2
STUDENT = {'lmbda': 1}
TEACHER = {'lmbda': 0, 'seq_kd': 'true'}


def options(tokens: int, batch: int, steps: int) -> dict:
    return {
        'rlhf_type': 'gkd',
        'tuner_type': 'full',
        'max_steps': steps,
        'per_device_train_batch_size': batch,
        'gradient_accumulation_steps': 1,
        'max_completion_length': tokens,
        'max_length': 256,
        'gkd_logits_topk': 16,
        'learning_rate': 1e-4,
        'temperature': 1,
        'external_plugins': [TESTS / 'engine' / 'vllm_on_cpu.py', HERE / 'step_timer.py'],
        'callbacks': 'step_timer',
    }


def make_models(directory: Path, student: int, teacher: int) -> helpers.TinyModels:
    """The tests' models, 6 layers deep and as wide as asked. Their distributions are almost flat, so that hardly an answer ends early."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    models = helpers.make_tiny_models(directory, head_dim=64)
    for path, hidden in ((models.student, student), (models.teacher, teacher)):
        tiny = Qwen3Config.from_pretrained(path)
        config = Qwen3Config(
            vocab_size=tiny.vocab_size,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=6,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tiny.eos_token_id,
            pad_token_id=tiny.pad_token_id,
        )
        torch.manual_seed(hidden)
        Qwen3ForCausalLM(config).save_pretrained(path)
    return models


@contextmanager
def rollout(models: helpers.TinyModels, directory: Path):
    server = RolloutServer(models, {}, directory / 'rollout.log')
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--batch', type=int, default=8, help='prompts per step')
    parser.add_argument('--tokens', type=int, default=64, help='tokens per response')
    parser.add_argument('--student', type=int, default=256, help='hidden size')
    parser.add_argument('--teacher', type=int, default=384, help='hidden size')
    parser.add_argument('--only', default='', help='measure the modes whose name has this in it')
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    models = make_models(root / 'models', args.student, args.teacher)
    colocate = {'use_vllm': 'true', 'vllm_mode': 'colocate', 'ddp_backend': 'gloo', **ENGINE}
    seconds: dict[tuple[str, str], list[float]] = {}
    with serving.vllm_serve(models.teacher, root) as teacher_url, rollout(models, root) as student_server:
        for repeat in range(args.repeats):
            server = {'use_vllm': 'true', **student_server.options}
            ahead = {'use_vllm': 'true', **student_server.options, 'gkd_prefetch': 'true'}
            remote = {'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': teacher_url}
            engine = {'gkd_teacher_engine': 'vllm', 'gkd_teacher_engine_args': helpers.VLLM_ENGINE_FLAGS}
            modes = {
                ('student', 'transformers'): STUDENT,
                ('student', 'vLLM, colocated'): {**STUDENT, **colocate},
                ('student', 'vLLM server'): {**STUDENT, **server},
                ('student', 'vLLM server, one step ahead'): {**STUDENT, **ahead},
                ('teacher', 'transformers'): TEACHER,
                ('teacher', 'vLLM server'): {**TEACHER, **remote},
                ('teacher', 'vLLM beside the training process'): {**TEACHER, **engine},
            }
            for number, (mode, more) in enumerate(modes.items()):
                if args.only not in ' '.join(mode):
                    continue
                output_dir = root / f'{repeat}-{number}'
                merged = {**helpers.QUICK, 'fp16': 'false', **models.with_teacher, **options(args.tokens, args.batch, args.steps)}
                argv = helpers.command_line({**merged, 'output_dir': output_dir, **more})
                environment = {**ENVIRONMENT, **(helpers.one_rank() if more.get('vllm_mode') == 'colocate' else {})}
                returncode, output = helpers.run(
                    [helpers.SCRIPTS / 'swift', 'rlhf', *argv],
                    env={**environment, 'GKD_TEACHER_API_KEY': KEY},
                    cwd=root,
                    timeout=1200,
                )
                if returncode:
                    sys.exit(f'{mode}:\n{output[-6000:]}')
                seconds.setdefault(mode, []).extend(json.loads((output_dir / 'steps.json').read_text())[WARM_UP:])
                print(repeat, *mode, round(statistics.median(seconds[mode]), 3), flush=True)
    with open(args.out, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['answers', 'by', 'prompts', 'tokens', 'steps', 'seconds_per_step', 'ratio_to_transformers'])
        for (source, by), values in seconds.items():
            median, base = statistics.median(values), statistics.median(seconds.get((source, 'transformers'), [float('nan')]))
            writer.writerow([source, by, args.batch, args.tokens, len(values), round(median, 3), round(median / base, 3)])


if __name__ == '__main__':
    main()
