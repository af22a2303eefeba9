"""Peak memory and seconds of whole training steps, ms-swift's GKD against the plugin's: the same command, models and batch.

    python benchmarks/training/step.py --out benchmarks/training/step.csv

A Qwen3 student and teacher with random weights, 2 layers and a vocabulary of 151,936, and dataset responses; a full fine-tune with
AdamW. Each measurement is a `swift rlhf --rlhf_type gkd` of its own, with SWIFT_GKD_PLUGIN=0 for ms-swift; they take turns. The first
step of a run is left out of the seconds (lazy initialisation), not of the memory.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
VOCAB, WORDS, RESPONSE = 151936, 1000, 250
IMPLEMENTATIONS = {'ms-swift': '0', 'ours': '1'}


def small(hidden: int) -> dict:
    """The shape of a model of two layers."""
    shape = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    return shape | dict(head_dim=hidden // 4, tie_word_embeddings=False)


def make_inputs(directory: Path, shapes: dict[str, dict], words: int = RESPONSE, vocab: int = VOCAB, **kind) -> None:
    """A Qwen3 of random weights for each name, and rows whose responses have so many words.

    Args:
        kind: `dtype` and `device` with which the models are made, torch's defaults otherwise.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', 'user', 'assistant', 'system']
    vocabulary = [f'w{i}' for i in range(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *vocabulary])}, unk_token='<|endoftext|>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')
    fast.add_special_tokens({'additional_special_tokens': ['<|im_start|>']})
    for seed, (name, shape) in enumerate(shapes.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(vocab_size=vocab, eos_token_id=2, pad_token_id=0, bos_token_id=None, **shape)
        with torch.device(kind.get('device', 'cpu')):
            model = Qwen3ForCausalLM(config)
        model.to(kind.get('dtype', torch.float32)).save_pretrained(directory / name)
        fast.save_pretrained(directory / name)
    draw = random.Random(0)
    text = lambda n: ' '.join(draw.choices(vocabulary, k=n))  # noqa: E731
    rows = [{'messages': [{'role': 'user', 'content': text(8)}, {'role': 'assistant', 'content': text(words)}]} for _ in range(64)]
    (directory / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def run(
    directory: Path, implementation: str, dtype: str, batch: int, steps: int, device: str, command: list | None = None, **changed
) -> list[dict]:
    """What `measure_step.py` wrote about each step.

    Args:
        command: What stands for `swift rlhf`.
        changed: Options with other values, None for those that are left out.
    """
    log = directory / 'steps.jsonl'
    log.unlink(missing_ok=True)
    options = {
        'rlhf_type': 'gkd',
        'model': directory / 'student',
        'model_type': 'qwen3',
        'template': 'qwen3',
        'teacher_model': directory / 'teacher',
        'teacher_model_type': 'qwen3',
        'dataset': directory / 'rows.jsonl',
        'tuner_type': 'full',
        'lmbda': 0,
        'beta': 0.5,
        'torch_dtype': dtype,
        'bf16': str(dtype == 'bfloat16').lower(),
        'fp16': 'false',
        'per_device_train_batch_size': batch,
        'gradient_accumulation_steps': 1,
        'max_steps': steps,
        'gradient_checkpointing': 'false',
        'max_length': 2 * RESPONSE,
        'use_cpu': str(device == 'cpu').lower(),
        'check_model': 'false',
        'load_from_cache_file': 'false',
        'report_to': 'none',
        'save_strategy': 'no',
        'eval_strategy': 'no',
        'split_dataset_ratio': 0,
        'dataloader_num_workers': 0,
        'dataset_num_proc': 1,
        'logging_steps': 1,
        'output_dir': directory / 'output',
        'external_plugins': HERE / 'measure_step.py',
        'callbacks': 'measure_step',
        **changed,
    }
    command = command or [Path(sys.executable).parent / 'swift', 'rlhf']
    argv = [*command, *(x for name, value in options.items() if value is not None for x in (f'--{name}', value))]
    env = {**os.environ, 'SWIFT_GKD_PLUGIN': IMPLEMENTATIONS[implementation], 'STEP_LOG': str(log), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([str(a) for a in argv], env=env, capture_output=True, text=True, cwd=directory)
    if done.returncode:
        raise RuntimeError(f'{implementation}, {dtype}: {done.stdout[-2000:]}{done.stderr[-4000:]}')
    return [json.loads(line) for line in log.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--hidden', type=int, default=256)
    parser.add_argument('--batch', type=int, default=4, help=f'rows, of {RESPONSE} trained tokens and a few more')
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--out', required=True)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        make_inputs(directory, {'student': small(args.hidden), 'teacher': small(args.hidden)})
        for dtype in args.dtypes:
            steps = {name: [] for name in IMPLEMENTATIONS}
            for _ in range(args.repeats):
                for name in IMPLEMENTATIONS:
                    steps[name].append(run(directory, name, dtype, args.batch, args.steps, args.device))
            found = {
                name: (
                    statistics.median(step['seconds'] for run in runs for step in run[1:]),
                    statistics.median(max(step['above_weights_gb'] for step in run) for run in runs),
                )
                for name, runs in steps.items()
            }
            for name, (seconds, gb) in found.items():
                rows.append(
                    {
                        'implementation': name,
                        'device': args.device,
                        'dtype': dtype,
                        'rows': args.batch,
                        'hidden': args.hidden,
                        'vocab': VOCAB,
                        'seconds': round(seconds, 2),
                        'above_weights_gb': round(gb, 2),
                        'seconds_ratio': round(seconds / found['ms-swift'][0], 3),
                        'memory_ratio': round(gb / found['ms-swift'][1], 3),
                    }
                )
                print(rows[-1], flush=True)
    with open(args.out, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
