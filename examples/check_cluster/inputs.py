"""What the configurations train on: random models of the quickstart's family, and rows of its task. ``python inputs.py DIRECTORY``."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'quickstart'))
import models
import task
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROWS, VALIDATION_ROWS = 64, 16
WIDER = 24  # more rows of embedding and head than the tokenizer has ids: padding, as between Qwen2.5's sizes

# Everything splits over two ranks each way, layers over two pipeline stages of two virtual ones, and all widths are multiples of 16,
# which fp8 asks for. With weights as large as these two random models differ by several tenths of a nat.
SMALL = dict(hidden=256, layers=4, heads=4, num_key_value_heads=2, initializer_range=0.1)
LARGE = dict(hidden=512, layers=4, heads=8, num_key_value_heads=4, initializer_range=0.1)
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, decoder_sparse_step=1, norm_topk_prob=True, router_aux_loss_coef=0.0
)
MODELS = {
    'student': dict(SMALL, seed=0),
    'copy': dict(SMALL, seed=0),
    'tied': dict(SMALL, seed=1, tie_word_embeddings=True),
    'moe': dict(SMALL, seed=2, **EXPERTS),
    'teacher': dict(LARGE, seed=3),
    'moe_teacher': dict(LARGE, seed=4, **EXPERTS),
    'wider_teacher': dict(LARGE, seed=5),
    # 150 MB in fp32: what it takes, and what of it two layers take, shows beside all else.
    'deep_teacher': dict(LARGE, seed=6, layers=16),
}


def make(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, shape in MODELS.items():
        more = {'vocab_size': len(models.tokenizer()) + WIDER} if name == 'wider_teacher' else {}
        models.make(directory / name, **shape, **more)
    make_adapter(directory / 'student', directory / 'adapter')
    rows = []
    for number, problem in enumerate(islice(task.problems(seed=0), ROWS + VALIDATION_ROWS)):
        wrong = [word for word in problem.words if word != problem.solution]
        rows.append(task.row(problem, tuple(wrong[: number % 4])))  # answers of four lengths
    write_rows(directory / 'rows.jsonl', rows[:ROWS])
    write_rows(directory / 'validation.jsonl', rows[ROWS:])
    privileged = [row | {'teacher_prompt': f'answer {row["messages"][1]["content"]} {row["messages"][0]["content"]}'} for row in rows]
    write_rows(directory / 'privileged.jsonl', privileged[:ROWS])


def make_adapter(student: Path, directory: Path) -> None:
    """One that has an effect: a fresh one is the base, and drawn differently in each layout."""
    torch.manual_seed(7)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules='all-linear', task_type='CAUSAL_LM')
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(student), config)
    for name, weight in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(directory)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
    make(Path(sys.argv[1]))
