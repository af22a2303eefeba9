"""Tiny Qwen3-VL models with random weights, made on the spot, and a dataset of coloured squares (template ``qwen3_vl``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import helpers

VISION = Path(sys.prefix) / 'vision'  # torchvision and what Qwen's templates import; see scripts/setup.sh
ON_CPU = Path(__file__).parent / 'multimodal' / 'cpu'
VOCAB_SIZE = 151936

# ms-swift's template has the ids of the real tokenizer in it.
SPECIAL = {
    '<|endoftext|>': 151643,
    '<|im_start|>': 151644,
    '<|im_end|>': 151645,
    '<|vision_start|>': 151652,
    '<|vision_end|>': 151653,
    '<|vision_pad|>': 151654,
    '<|image_pad|>': 151655,
    '<|video_pad|>': 151656,
}


# Of a film 4 frames; sounds are read as vLLM reads them, without librosa's many dependencies.
MEDIA = {'VIDEO_MAX_TOKEN_NUM': '4', 'VIDEO_MIN_TOKEN_NUM': '1', 'FPS_MIN_FRAMES': '4', 'FPS_MAX_FRAMES': '4'}
MEDIA |= {'SWIFT_AUDIO_LOAD_BACKEND': 'soundfile_pyav'}


def environment(*, vllm: bool = False) -> dict[str, str]:
    """Variables of a process that handles images; and films and sounds, so that tests with either share a process with the imports."""
    variables = helpers.vllm_environment() if vllm else {}
    paths = [str(ON_CPU), str(VISION), *([variables['PYTHONPATH']] if vllm else [])]
    # One patch of an image token has 32 x 32 pixels; at most 4 of them per image.
    return {**variables, **MEDIA, 'PYTHONPATH': ':'.join(paths), 'IMAGE_MAX_TOKEN_NUM': '4', 'IMAGE_MIN_TOKEN_NUM': '1'}


def why_none() -> str | None:
    return None if (VISION / 'torchvision').is_dir() else f'there is no torchvision in {VISION}; scripts/setup.sh installs it'


def make(directory: Path, *, moe: bool = False) -> helpers.TinyModels:
    """Student and teacher of one architecture, 2 layers each. Run in a process with :func:`environment`; the same seeds give the same
    files.

    Args:
        moe: Qwen3-VL-MoE with 4 experts, 2 of them per token.
    """
    import transformers

    processor = _processor()
    for name, hidden, seed in (('student', 64, 1), ('teacher', 64, 2)):
        text, vision = text_config(hidden, moe=moe), vision_config(hidden)
        kind = 'Qwen3VLMoe' if moe else 'Qwen3VL'
        config = getattr(transformers, f'{kind}Config')(
            text_config=text,
            vision_config=vision,
            image_token_id=SPECIAL['<|image_pad|>'],
            video_token_id=SPECIAL['<|video_pad|>'],
            vision_start_token_id=SPECIAL['<|vision_start|>'],
            vision_end_token_id=SPECIAL['<|vision_end|>'],
            tie_word_embeddings=False,
        )
        transformers.set_seed(seed)
        model = getattr(transformers, f'{kind}ForConditionalGeneration')(config)
        model.generation_config.eos_token_id = SPECIAL['<|im_end|>']
        model.save_pretrained(directory / name)
        processor.save_pretrained(directory / name)
    rows = _rows(directory)
    for name, part in (('train', rows[:32]), ('val', rows[32:])):
        helpers.write_rows(directory / f'{name}.jsonl', part)
    return helpers.TinyModels(directory / 'student', directory / 'teacher', directory / 'train.jsonl', directory / 'val.jsonl')


def text_config(hidden: int, *, moe: bool) -> dict:
    """Two layers, with 4 experts of which a token takes 2, or dense."""
    experts = dict(
        moe_intermediate_size=48, num_experts_per_tok=2, num_experts=4, num_local_experts=4, decoder_sparse_step=1, mlp_only_layers=[]
    )
    return dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rope_parameters=dict(rope_theta=1e4, rope_type='default', mrope_section=[8, 4, 4], mrope_interleaved=True),
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **(experts if moe else {}),
    )


def vision_config(hidden: int) -> dict:
    return dict(
        depth=2,
        hidden_size=64,
        intermediate_size=64,
        num_heads=2,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=hidden,
        deepstack_visual_indexes=[0],
        num_position_embeddings=64,
        initializer_range=0.2,
    )


def _rows(directory: Path) -> list[dict]:
    from PIL import Image

    colours = {'red': (200, 20, 20), 'green': (20, 200, 20), 'blue': (20, 20, 200), 'grey': (90, 90, 90)}
    rows = []
    for number in range(40):
        name = list(colours)[number % len(colours)]
        path = directory / f'{number}.png'
        Image.new('RGB', (64, 32 + 32 * (number % 2)), colours[name]).save(path)
        question = {'role': 'user', 'content': '<image>what colour is the square ?'}
        rows.append({'messages': [question, {'role': 'assistant', 'content': f'the square is {name} .'}], 'images': [str(path)]})
    return rows


def tokenizer(special: dict[str, int]):
    """A byte-level one with a chat template.

    Args:
        special: The special tokens that the rows and templates use, and their ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ['what colour is the square ? the square is red green blue grey . system user assistant']
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    content = json.loads(bpe.to_str())
    content['model']['vocab'] |= special
    content['added_tokens'] = [{**token, 'id': special[token['content']]} for token in content['added_tokens']]
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    sounds = {'audio_token': '<|audio_pad|>', 'audio_bos_token': '<|audio_start|>', 'audio_eos_token': '<|audio_end|>'}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token='<|im_end|>',
        pad_token='<|endoftext|>',
        extra_special_tokens={
            'image_token': '<|image_pad|>',
            'video_token': '<|video_pad|>',
            'vision_bos_token': '<|vision_start|>',
            'vision_eos_token': '<|vision_end|>',
            **{name: token for name, token in sounds.items() if token in special},
        },
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _processor():
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    patches, text = dict(patch_size=16, merge_size=2, temporal_patch_size=2), tokenizer(SPECIAL)
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, min_pixels=32 * 32, max_pixels=64 * 64),
        tokenizer=text,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=text.chat_template,
    )


if __name__ == '__main__':
    make(Path(sys.argv[1]), moe='moe' in sys.argv[2:])
