"""Plain transformers with a quantiser, in a process of its own that has one: ``python quantised.py task.json``.

The task: ``{"models": {name: [directory, BitsAndBytesConfig]}, "ids": [[...], ...], "out": file, "save": {name: directory}}``.
``out`` becomes {name: a list of whole logits [tokens, vocabulary] in fp32, one for each row of ids}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main(path: str) -> None:
    task = json.loads(Path(path).read_text())
    logits = {}
    for name, (directory, settings) in task['models'].items():
        if settings.get('load_in_4bit'):
            settings |= {'bnb_4bit_compute_dtype': torch.float32, 'bnb_4bit_quant_type': 'nf4', 'bnb_4bit_use_double_quant': True}
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32, device_map='cpu')
        if name in task['save']:
            # Now: bitsandbytes packs the weights for the CPU at the first forward.
            model.save_pretrained(task['save'][name])
            AutoTokenizer.from_pretrained(directory).save_pretrained(task['save'][name])
            model = AutoModelForCausalLM.from_pretrained(task['save'][name], dtype=torch.float32, device_map='cpu')
        with torch.no_grad():
            logits[name] = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in task['ids']]
    torch.save(logits, task['out'])


if __name__ == '__main__':
    main(sys.argv[1])
