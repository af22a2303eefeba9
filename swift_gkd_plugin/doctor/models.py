"""Whether student and teacher fit each other beyond what a run refuses: where they stop, how they are asked, whether they think."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, GenerationConfig

from .. import checks
from ..arguments import learns_from_rewards
from .findings import Findings

ASKED = [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Good morning'}]


@dataclass
class Model:
    """What is known of a model without its weights.

    Attributes:
        name: As the options have it.
        tokenizer: Of transformers.
        meta: ms-swift's template of its own.
        config: Of transformers.
        ends: Ids with which it ends a response: those of its generation_config, configuration and tokenizer.
    """

    name: str
    tokenizer: Any
    meta: Any
    config: Any
    ends: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, name: str, processor: Any) -> Model:
        """Args: how the options call it, and ms-swift's processor of it."""
        from swift.template import TEMPLATE_MAPPING

        directory = processor.model_info.model_dir
        config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        tokenizer = getattr(processor, 'tokenizer', processor)
        try:
            generation = GenerationConfig.from_pretrained(directory)
        except OSError:
            generation = GenerationConfig()
        ends = {tokenizer.eos_token_id}
        for where in (generation, config, config.get_text_config()):
            ids = getattr(where, 'eos_token_id', None)
            ends |= set(ids) if isinstance(ids, list | tuple) else {ids}
        return cls(name, tokenizer, TEMPLATE_MAPPING.get(processor.model_meta.template), config, ends - {None})

    @property
    def own_template(self) -> str:
        return self.tokenizer.chat_template or ''

    @property
    def thinks(self) -> str:
        """``never``, ``always`` or ``if asked to``."""
        switch = 'enable_thinking' in self.own_template or bool(self.meta and self.meta.non_thinking_prefix)
        always = bool(self.meta and self.meta.is_thinking)
        return 'if asked to' if switch else 'always' if always else 'never'

    @property
    def columns(self) -> int:
        return self.config.get_text_config().vocab_size


def stop_id(template: Any) -> int | None:
    """The id that the template puts behind a response: the first special one of those that are trained behind its text."""
    labels = [label for label in template.encode({'messages': [dict(m) for m in ASKED]})['labels'] if label != -100]
    tokenizer = template.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return next((label for label in reversed(labels) if label in special), None)


def compare(args: Any, template: Any, student: Model, teacher: Model | None, found: Findings) -> None:
    """
    Args:
        args: ms-swift's arguments.
        template: Of the student, in its mode ``train``.
        teacher: None for one that is the student, or behind a server.
    """
    found.section = 'models'
    stop = stop_id(template)
    _ends(args, stop, student, teacher, found)
    if teacher is not None:
        _templates(args, template, student, teacher, found)
        _thinking(args, student, teacher, found)


def _ends(args: Any, stop: int | None, student: Model, teacher: Model | None, found: Findings) -> None:
    def named(ids: set[int], model: Model) -> str:
        return ' or '.join(repr(token) for token in model.tokenizer.convert_ids_to_tokens(sorted(ids))) or 'nothing'

    if stop is None:
        found.warning(
            'stop',
            f'--template {args.template} puts no end token behind a response: nothing teaches the student to stop.',
            "Choose the template of the student's chat model with --template.",
        )
        return
    end, fine = named({stop}, student), True
    if teacher is not None and stop not in teacher.ends:
        fine = False
        found.warning(
            'stop_of_teacher',
            f'Responses end with {end}, and the teacher {teacher.name} ends its own with {named(teacher.ends, teacher)}: it gives {end} '
            'little probability, and the student never learns to stop.',
            "Use the chat version of the teacher, a --template that ends as the teacher's does, or add --sft_alpha.",
        )
    if stop not in student.ends:
        fine = False
        found.warning(
            'stop_of_student',
            f'Responses end with {end}, but the generation_config and tokenizer of {student.name} stop at {named(student.ends, student)}: '
            'ms-swift stops at both, other servers of the trained model go on behind its answer.',
            f'Start from the chat version of the student, or add {stop} to eos_token_id of its generation_config.json.',
        )
    if fine:
        found.ok('stop', f'Responses end with {end}, at which {"both models stop" if teacher else "the model stops"}.')


def _templates(args: Any, template: Any, student: Model, teacher: Model, found: Findings) -> None:
    used, own = args.template, teacher.meta.template_type if teacher.meta else None
    if not teacher.own_template and student.own_template:
        found.warning(
            'template',
            f'{teacher.name} has no chat template: a base model, asked in the form of --template {used}, which it was not trained for.',
            "Use the teacher's chat version.",
        )
    elif own is not None and own != used:
        found.warning(
            'template',
            f'Both models are asked in the form of --template {used}; that of {teacher.name} is {own}.',
            f'Use models of one family, or --template {own} if the student can learn it.',
        )
    elif teacher.own_template != student.own_template:
        found.note(
            'template',
            f'The chat templates of {student.name} and {teacher.name} themselves differ; both are asked in the form of --template {used}.',
            'Check that the teacher answers well in that form: `swift infer` with --template and --system as here.',
        )
    else:
        found.ok('template', f'Both models are asked in the form of --template {used}, and have the same chat template themselves.')


def _thinking(args: Any, student: Model, teacher: Model, found: Findings) -> None:
    one, other = student.thinks, teacher.thinks
    if one == other or args.gkd_teacher_enable_thinking is not None:
        found.ok('thinking', f'The student thinks {one}, the teacher {other}.')
        return
    found.warning(
        'thinking',
        f'The student thinks {one}, the teacher {other}: responses of the one surprise the other from their first token.',
        'Set --enable_thinking, --gkd_teacher_enable_thinking, or use models that agree.',
    )


def vocabularies(student: Model, teacher: Model | None, tokens: tuple[int, int] | None, found: Findings) -> int:
    """Whether heads and tokenizers agree.

    Returns:
        The columns that are compared.
    """
    found.section = 'models'
    if teacher is None or tokens is None:
        return student.columns
    compared = checks.compared_columns(student.columns, teacher.columns, *tokens)
    if student.columns == teacher.columns == compared:
        found.ok('vocabulary', f'Both have {compared} columns, and tokenizers of {tokens[0]} tokens that agree.')
    else:
        found.note(
            'vocabulary',
            f'Output heads of {student.columns} and {teacher.columns} columns, tokenizers of {tokens[0]} and {tokens[1]} tokens: the first '
            f'{compared} are compared.',
            'Nothing, if the models are of one family.',
        )
    return compared


def is_student(args: Any) -> bool:
    """Whether the teacher is what the student starts from, as far as that can be known before the weights."""
    local = args.teacher_model is None and args.teacher_model_server is None and args.gkd_loss_weight > 0
    resumes = bool(args.adapters or getattr(args, 'resume_from_checkpoint', None) or getattr(args, 'mcore_adapter', None))
    return checks.teacher_is_start(args) or (local and not resumes and not getattr(args, '_adapter_on_base', None))


def equality(args: Any, dataset: Any, found: Findings) -> None:
    """A teacher that equals the student."""
    found.section = 'models'
    if not is_student(args):
        return
    if checks.teacher_sees_more(args, dataset):
        found.ok('equal', 'The teacher is what the student starts from, and sees more than it: self-distillation with privileged context.')
    elif args.sft_alpha > 0 or learns_from_rewards(args):
        found.note('equal', 'The teacher is what the student starts from: the divergence keeps it there, the rest of the loss teaches.')
    else:
        found.warning(
            'equal',
            'NOTHING TO LEARN: the teacher is what the student starts from and sees the same prompt, so the divergence is 0.',
            'Give another --teacher_model, a column teacher_prompt or teacher_images, an adapter to start from, or --sft_alpha > 0.',
        )
