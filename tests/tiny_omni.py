"""A tiny Qwen3-Omni-MoE with random weights, made on the spot, and datasets with what it reads: images, films and sounds.

Only the thinker is there: it is what is trained, and ``enable_audio_output`` false leaves the talker out. ms-swift takes the ids of the
placeholders from the configuration, so the vocabulary is small.
"""

from __future__ import annotations

import math
import struct
import sys
import wave
from pathlib import Path

import helpers
import tiny_vision

COLOURS = {'red': (200, 20, 20), 'green': (20, 200, 20), 'blue': (20, 20, 200), 'grey': (90, 90, 90)}
SOUND_TOKENS = ('<|audio_start|>', '<|audio_end|>', '<|audio_pad|>')
NAMES = {'model_type': 'qwen3_omni_moe', 'template': 'qwen3_omni', 'teacher_model_type': 'qwen3_omni_moe'}


def environment(*, vllm: bool = False) -> dict[str, str]:
    """Variables of a process that handles images, films and sounds."""
    return tiny_vision.environment(vllm=vllm)


def make(directory: Path) -> None:
    """``student`` and ``teacher``, 2 layers each with 4 experts, and the datasets of :func:`write_rows`."""
    import transformers

    processor = _processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    placeholders = {f'{kind}_token_id': ids(f'<|{kind}_pad|>') for kind in ('image', 'video', 'audio')}
    for name, seed in (('student', 1), ('teacher', 2)):
        thinker = {
            'audio_config': {
                'encoder_layers': 2,
                'encoder_attention_heads': 2,
                'encoder_ffn_dim': 64,
                'd_model': 64,
                'downsample_hidden_size': 8,
                'output_dim': 64,
                'initializer_range': 0.2,
            },
            # The last two are in the real model's configuration too, and read by vLLM alone.
            'vision_config': {**tiny_vision.vision_config(64), 'image_size': 128, 'apply_vit_abs_pos_embed': True},
            'text_config': {**tiny_vision.text_config(64, moe=True), 'vocab_size': 512},
            **placeholders,
            'audio_start_token_id': ids('<|audio_start|>'),
            'vision_start_token_id': ids('<|vision_start|>'),
            'vision_end_token_id': ids('<|vision_end|>'),
            'initializer_range': 0.2,
        }
        marks = {'im_start_token_id': ids('<|im_start|>'), 'im_end_token_id': ids('<|im_end|>')}
        config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False, **marks)
        transformers.set_seed(seed)
        model = transformers.Qwen3OmniMoeForConditionalGeneration(config)
        model.generation_config.eos_token_id = ids('<|im_end|>')
        model.save_pretrained(directory / name)
        processor.save_pretrained(directory / name)
    write_rows(directory)


def _processor():
    import transformers
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    patches = {'patch_size': 16, 'merge_size': 2, 'temporal_patch_size': 2}
    special = {token: number for number, token in enumerate((*tiny_vision.SPECIAL, *SOUND_TOKENS))}
    tokenizer = tiny_vision.tokenizer(special)
    return transformers.Qwen3OmniMoeProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**patches, min_pixels=32 * 32, max_pixels=64 * 64),
        video_processor=Qwen2VLVideoProcessor(**patches),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=30),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def write_rows(directory: Path, number: int = 16) -> None:
    """``images``, ``frames`` (a film as a list of images), ``films`` (files), ``sounds``, ``both`` (an image and a sound) and ``text``,
    each a JSONL file of ``number`` rows, and ``mixed``, the four kinds that one file can hold in turn."""
    from PIL import Image

    rows = {kind: [] for kind in ('images', 'frames', 'films', 'sounds', 'both', 'text')}
    for i in range(number):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        frames = []
        for shade in range(4):
            picture = Image.new('RGB', (64, 32 + 32 * (i % 2)), tuple(c // (shade + 1) for c in colour))
            frames.append(directory / f'{i}-{shade}.png')
            picture.save(frames[-1])
        film, sound = directory / f'{i}.mp4', directory / f'{i}.wav'
        _film(film, [Image.open(frame) for frame in frames])
        # All of one length: a sound of less than a second comes out of transformers' audio tower with traces of a longer one beside it.
        _sound(sound, 200 * (1 + i % len(COLOURS)), 0.3)
        media = {
            'images': {'images': [str(frames[0])]},
            'frames': {'videos': [list(map(str, frames))]},
            'films': {'videos': [str(film)]},
            'sounds': {'audios': [str(sound)]},
            'both': {'images': [str(frames[0])], 'audios': [str(sound)]},
            'text': {},
        }
        for kind, of_this in media.items():
            tags = ''.join(f'<{column[:-1]}>' for column in of_this)
            question = {'role': 'user', 'content': f'{tags}what colour is the square ?'}
            rows[kind].append({'messages': [question, {'role': 'assistant', 'content': f'the square is {name} .'}], **of_this})
    for kind, of_this in rows.items():
        helpers.write_rows(directory / f'{kind}.jsonl', of_this)
    kinds = ('images', 'text', 'sounds', 'frames')
    helpers.write_rows(directory / 'mixed.jsonl', [rows[kinds[i % len(kinds)]][i] for i in range(number)])


def _film(path: Path, pictures: list) -> None:
    import av

    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mpeg4', rate=2)
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, 'yuv420p'
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _sound(path: Path, hertz: float, seconds: float, rate: int = 16000) -> None:
    values = [int(20000 * math.sin(2 * math.pi * hertz * i / rate)) for i in range(int(seconds * rate))]
    with wave.open(str(path), 'wb') as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(struct.pack(f'<{len(values)}h', *values))


if __name__ == '__main__':
    make(Path(sys.argv[1]))
