"""Peak memory and seconds of a LoRA step that learns from its own base, on an image-heavy batch.

    python benchmarks/training/self_distillation.py --out benchmarks/training/self_distillation.csv

One Qwen3-VL-MoE with random weights, one batch, LoRA on the language model, five ways: `swift sft`; the same cross-entropy by the plugin's
operator, which makes no logits; shared-base GKD; ms-swift's GKD with its adapter switched off; GKD with a second copy of the base. Each
measurement is a command of its own; they take turns, the first step of a run is left out of the seconds, and medians are reported. Memory
is the weights (one copy of the base, or two) and the process's peak above what it held when training began.
Needs what `scripts/setup.sh` installs for the tests.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / 'tests'))

import helpers  # noqa: E402
import tiny_vision  # noqa: E402

IMAGE = 256  # pixels on a side: 64 tokens


def make_inputs(directory: Path, hidden: int, images: int) -> None:
    import torch
    from PIL import Image
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    models = tiny_vision.make(directory, moe=True)
    config = Qwen3VLMoeConfig.from_pretrained(models.student)
    text, vision = config.text_config, config.vision_config
    text.hidden_size = vision.out_hidden_size = hidden
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 6, hidden // 32, hidden // 32
    text.moe_intermediate_size = hidden
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = hidden, 3 * hidden, 6, hidden // 32
    torch.manual_seed(0)
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(models.student)
    path = models.student / 'processor_config.json'
    processor = json.loads(path.read_text())
    processor['image_processor']['size'] = {'shortest_edge': 32 * 32, 'longest_edge': IMAGE * IMAGE}
    path.write_text(json.dumps(processor))
    shutil.copytree(models.student, directory / 'copy')
    rows = []
    for number in range(16):
        paths = []
        for place in range(images):
            paths.append(str(directory / f'large-{number}-{place}.png'))
            Image.new('RGB', (IMAGE, IMAGE), (10 * number, 40 * place, 90)).save(paths[-1])
        question = {'role': 'user', 'content': '<image>' * images + 'what colour is the square ?'}
        told = '<image>' * images + 'the squares have colours . what colour is the square ?'
        answer = {'role': 'assistant', 'content': 'the square is red . ' * 12}
        rows.append({'messages': [question, answer], 'images': paths, 'teacher_prompt': told})
    helpers.write_rows(directory / 'rows.jsonl', rows)


def ways(directory: Path) -> dict[str, tuple[str, str, dict]]:
    """name: (command, SWIFT_GKD_PLUGIN, options)."""
    gkd = {'rlhf_type': 'gkd', 'lmbda': 0, 'beta': 0.5}
    model = directory / 'student'
    copy = {'teacher_model': directory / 'copy', 'teacher_model_type': 'qwen3_vl_moe'}
    return {
        'sft': ('sft', '0', {}),
        "sft by the operator's cross-entropy": ('rlhf', '1', {**gkd, 'gkd_loss_weight': 0, 'sft_alpha': 1}),
        'shared base': ('rlhf', '1', {**gkd, 'gkd_self_teacher': 'base'}),
        'ms-swift, adapter off': ('rlhf', '0', {**gkd, 'teacher_model': model, 'teacher_model_type': 'qwen3_vl_moe'}),
        'second copy': ('rlhf', '1', {**gkd, **copy}),
    }


def run(directory: Path, command: str, plugin: str, options: dict, batch: int, steps: int) -> list[dict]:
    log = directory / 'steps.jsonl'
    log.unlink(missing_ok=True)
    options = {
        **helpers.QUICK,
        'fp16': 'false',
        'model': directory / 'student',
        'model_type': 'qwen3_vl_moe',
        'template': 'qwen3_vl',
        'dataset': directory / 'rows.jsonl',
        'tuner_type': 'lora',
        'per_device_train_batch_size': batch,
        'gradient_accumulation_steps': 1,
        'max_steps': steps,
        'output_dir': directory / 'output',
        'external_plugins': HERE / 'measure_step.py',
        'callbacks': 'measure_step',
        **options,
    }
    argv = [str(helpers.SCRIPTS / 'swift'), command, *map(str, helpers.command_line(options))]
    variables = {**helpers.OFFLINE, **tiny_vision.environment(), 'OMP_NUM_THREADS': '2', 'IMAGE_MAX_TOKEN_NUM': '64'}
    env = {**os.environ, **variables, 'SWIFT_GKD_PLUGIN': plugin, 'STEP_LOG': str(log)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd=directory)
    if done.returncode:
        raise SystemExit(f'{argv}: {done.stdout[-2000:]}{done.stderr[-4000:]}')
    return [json.loads(line) for line in log.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--hidden', type=int, default=768)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--images', type=int, default=4, help='per row')
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out', required=True)
    args = parser.parse_args()
    if 'torchvision' not in sys.modules and str(tiny_vision.VISION) not in sys.path:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **tiny_vision.environment()})
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        make_inputs(directory, args.hidden, args.images)
        weights = (directory / 'copy' / 'model.safetensors').stat().st_size / 1e9
        steps = {name: [] for name in ways(directory)}
        for _ in range(args.repeats):
            for name, way in ways(directory).items():
                steps[name].append(run(directory, *way, args.batch, args.steps))
                print(name, steps[name][-1][-1], flush=True)
    found = {
        name: (
            statistics.median(step['seconds'] for run in runs for step in run[1:]),
            statistics.median(max(step['above_weights_gb'] for step in run) for run in runs)
            + weights * (2 if name == 'second copy' else 1),
        )
        for name, runs in steps.items()
    }
    base = found["sft by the operator's cross-entropy"]
    with open(args.out, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['way', 'rows', 'images', 'hidden', 'seconds', 'weights_gb', 'peak_gb', 'seconds_ratio', 'memory_ratio'])
        for name, (seconds, gb) in found.items():
            ratios = round(seconds / base[0], 3), round(gb / base[1], 3)
            writer.writerow([name, args.batch, args.images, args.hidden, round(seconds, 2), round(weights, 2), round(gb, 2), *ratios])


if __name__ == '__main__':
    main()
