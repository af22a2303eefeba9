"""What plain transformers makes of rows with media, one row at a time: ``python plain_omni.py DIRECTORY KIND ... > answers.json``.

For the first rows of each kind: the mean Jensen-Shannon divergence of the two models over the tokens of the responses, from whole logits
in float64, and what the student and the teacher answer greedily, no placeholder of a medium. Nothing of ms-swift or of the plugin takes
part.
"""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path

import numpy as np
import torch
import transformers

ROWS, NEW_TOKENS = 4, 8
TAGS = {
    '<image>': '<|vision_start|><|image_pad|><|vision_end|>',
    '<video>': '<|vision_start|><|video_pad|><|vision_end|>',
    '<audio>': '<|audio_start|><|audio_pad|><|audio_end|>',
}


def sound(path: str) -> np.ndarray:
    with wave.open(path) as file:
        values = np.frombuffer(file.readframes(file.getnframes()), dtype='<i2').astype(np.float32) / 32768
    return values[: len(values) // 160 * 160]


def film(frames: list[str] | str) -> np.ndarray:
    from PIL import Image

    if isinstance(frames, str):
        import decord

        return decord.VideoReader(frames)[:].asnumpy()
    return np.stack([np.asarray(Image.open(frame).convert('RGB')) for frame in frames])


def prompt(processor, row: dict) -> dict:
    from PIL import Image

    question = row['messages'][0]['content']
    for tag, tokens in TAGS.items():
        question = question.replace(tag, tokens)
    media = {
        'images': [Image.open(path) for path in row.get('images', ())],
        'videos': [film(frames) for frames in row.get('videos', ())],
        'audio': [sound(path) for path in row.get('audios', ())],
    }
    text = f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n'
    media = {name: values for name, values in media.items() if values}
    return processor(text=text, **media, **({'fps': 2.0} if 'videos' in media else {}), do_resize=False, return_tensors='pt')


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[tokens] of two tensors of logits."""
    p, q = (logits.double().log_softmax(-1) for logits in (student, teacher))
    m = torch.logaddexp(p, q) - np.log(2)
    return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))


@torch.no_grad()
def main(directory: Path, kinds: list[str]) -> dict:
    processor = transformers.AutoProcessor.from_pretrained(directory / 'student')
    load = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained
    student, teacher = (load(directory / name, dtype=torch.float32).eval().thinker for name in ('student', 'teacher'))
    ids = processor.tokenizer.convert_tokens_to_ids
    ends, media = ids(['<|im_end|>', '<|endoftext|>']), ids(['<|image_pad|>', '<|video_pad|>', '<|audio_pad|>'])
    greedy = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0, suppress_tokens=media
    )
    found = {}
    for kind in kinds:
        rows = [json.loads(line) for line in (directory / f'{kind}.jsonl').read_text().splitlines()[:ROWS]]
        values, answers = [], {'student': [], 'teacher': []}
        for row in rows:
            inputs = prompt(processor, row)
            for name, model in (('student', student), ('teacher', teacher)):
                answer = model.generate(**inputs, generation_config=greedy)[0, inputs['input_ids'].shape[1] :]
                answers[name].append(processor.tokenizer.decode(answer))
            response = processor.tokenizer(row['messages'][1]['content'] + '<|im_end|>\n', return_tensors='pt').input_ids
            inputs['input_ids'] = torch.cat([inputs['input_ids'], response], 1)
            inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
            logits = [model(**inputs).logits[0, -response.shape[1] - 1 : -1] for model in (student, teacher)]
            values.append(divergence(*logits))
        found[kind] = {'divergence': torch.cat(values).mean().item(), **answers}
    return found


if __name__ == '__main__':
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
