"""Start-up checks that need a tokenizer, a dataset or a configuration, but no weights."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from .arguments import OptionError, extrapolates

SAMPLED_ROWS = 1000  # rows that are looked at before training; the others are checked when their turn comes


def common_vocabulary(student, teacher, student_name: str, teacher_name: str) -> int:
    """Compare two tokenizers.

    Args:
        student, teacher: Tokenizers of transformers.
        student_name, teacher_name: How the options call them.

    Returns:
        The number of leading token ids that both have; every one of them is the same token.

    Raises:
        OptionError: An id that both have is another token in the other.
    """
    common = min(len(student), len(teacher))
    ours, theirs = (tokenizer.convert_ids_to_tokens(range(common)) for tokenizer in (student, teacher))
    different = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if different:
        first = different[0]
        raise OptionError(
            f'--model {student_name} and --teacher_model {teacher_name} have different tokenizers: id {first} is {ours[first]!r} in the '
            f'student and {theirs[first]!r} in the teacher ({len(different)} of {common} ids differ); distributions over different tokens '
            'cannot be compared, use models of one family.'
        )
    return common


def tokenizer_lengths(args: Any, student: Any) -> tuple[int, int] | None:
    """Compare the student's tokenizer with that of a teacher that is another model.

    Args:
        student: The student's tokenizer, or the processor that has it.

    Returns:
        The lengths of the student's and of the teacher's; None if there is no other model.

    Raises:
        OptionError: See :func:`common_vocabulary`.
    """
    if args.teacher_model is None:
        return None
    from swift.utils import get_logger

    _, teacher = args.get_model_processor(
        model=args.teacher_model, model_type=args.teacher_model_type, revision=args.teacher_model_revision, load_model=False
    )
    student, teacher = (getattr(processor, 'tokenizer', processor) for processor in (student, teacher))
    common = common_vocabulary(student, teacher, args.model, args.teacher_model)
    if len(student) != len(teacher):
        get_logger().info(
            f'The tokenizers share their first {common} ids (student {len(student)}, teacher {len(teacher)}); only those are compared.'
        )
    return len(student), len(teacher)


def compared_columns(student_vocab: int, teacher_vocab: int, student_tokens: int, teacher_tokens: int) -> int:
    """The number of leading columns over which both distributions are normalised.

    Args:
        student_vocab, teacher_vocab: Rows of the output heads, padding rows included.
        student_tokens, teacher_tokens: Lengths of the tokenizers.

    Returns:
        All columns if both sides have the same; otherwise the tokens that both know, without any padding row.
    """
    if (student_vocab, student_tokens) == (teacher_vocab, teacher_tokens):
        return student_vocab
    return min(student_vocab, teacher_vocab, student_tokens, teacher_tokens)


def has_response(row: dict[str, Any]) -> bool:
    messages = row.get('messages') or []
    return bool(messages) and messages[-1]['role'] == 'assistant' and messages[-1].get('content') not in (None, '')


def check_datasets(args: Any, train_dataset: Iterable[dict[str, Any]] | None, val_dataset: Iterable[dict[str, Any]] | None) -> None:
    """Raises:
    OptionError: A dataset that is given has no row, or lacks the responses that are learnt from or scored.
    """
    if args.dataset:
        needed = None if args.lmbda == 1 or args.seq_kd else f'--lmbda {args.lmbda} without --seq_kd trains on responses of the dataset'
        rows = train_dataset if train_dataset is not None else []
        check_rows(rows, '--dataset', needed, 'let the models answer: --lmbda 1, or --seq_kd true')
    if val_dataset is not None:
        needed = '--gkd_eval_source dataset scores responses of the dataset' if args.gkd_eval_source == 'dataset' else None
        check_rows(val_dataset, '--val_dataset', needed, 'score generated ones: --gkd_eval_source student')


def check_rows(rows: Iterable[dict[str, Any]], option: str, needs_response: str | None, instead: str) -> None:
    """Look at the first rows of a dataset.

    Args:
        option: ``--dataset`` or ``--val_dataset``, for the message.
        needs_response: Why the rows' own responses are needed, None if they aren't.
        instead: What to do without them.

    Raises:
        OptionError: There is no row, or none of the first rows has the response that it needs.
    """
    looked_at = list(itertools.islice(rows, SAMPLED_ROWS))
    if not looked_at:
        raise OptionError(f'{option}: the dataset has 0 rows; check its path, its format and --split_dataset_ratio.')
    if needs_response and not any(map(has_response, looked_at)):
        raise OptionError(
            f'{option}: none of the first {len(looked_at)} rows has a response, and {needs_response}. Use a dataset with responses, or '
            f'{instead}.'
        )


def check_tags(datasets: Iterable[Any], column: str, servers: list[set[str]]) -> None:
    """Look at the tag of every row; of a stream, at those of the first rows.

    Args:
        datasets: Of ms-swift, or None.
        column: Where the tags are. ms-swift fills ``dataset`` itself, with the name of the dataset that a row comes from.
        servers: The tags of each of several teacher servers.

    Raises:
        OptionError: A row has a tag that no server has, or none; or no row has one of a server's.
    """
    known, found, streamed = set().union(*servers), set(), False
    for rows in filter(None, datasets):
        streamed |= not hasattr(rows, '__len__')
        for number, tag in enumerate(_tags(rows, column)):
            if tag is None or str(tag) not in known:
                raise OptionError(
                    f'--teacher_tag_key {column}: row {number} has the tag {tag!r}, and the servers of --teacher_model_server have '
                    f'{", ".join(sorted(known))}.'
                )
            found.add(str(tag))
    idle = [tags for tags in servers if not tags & found]
    if idle and not streamed:
        raise OptionError(
            f'--teacher_tag_key {column}: no row is for the server of {", ".join(sorted(idle[0]))}, the rows have '
            f'{", ".join(sorted(found))}; correct the tags, or leave the server out.'
        )


def _tags(rows: Any, column: str) -> Iterator[Any]:
    if hasattr(rows, '__len__') and column in rows.column_names:
        batches = rows.select_columns(column).iter(SAMPLED_ROWS)  # without the rest of a row, a second for half a million rows
        return itertools.chain.from_iterable(batch[column] for batch in batches)
    return (row.get(column) for row in itertools.islice(rows, SAMPLED_ROWS))


def has_media(datasets: Iterable[Iterable[dict[str, Any]] | None]) -> bool:
    """Whether one of the first rows has images, videos or audio."""
    columns = ('images', 'videos', 'audios', 'teacher_images')
    return any(row.get(column) for rows in datasets for row in itertools.islice(rows or (), SAMPLED_ROWS) for column in columns)


def check_topk(args: Any) -> None:
    """Raises:
    OptionError: ``--gkd_logits_topk`` asks for more token ids than the student has.
    """
    if args.gkd_logits_topk is None:
        return
    from transformers import AutoConfig

    vocab = AutoConfig.from_pretrained(args.model_dir, trust_remote_code=True).get_text_config().vocab_size
    if args.gkd_logits_topk > vocab:
        raise OptionError(f'--gkd_logits_topk {args.gkd_logits_topk}: the student has {vocab} token ids; choose fewer.')


def check_teacher_engine(args: Any) -> None:
    """Raises:
    OptionError: ``--gkd_teacher_engine vllm`` without vLLM, or for a teacher that is the student's base.
    """
    if args.gkd_teacher_engine == 'vllm' and args.teacher_model is None:
        raise OptionError(
            "--gkd_teacher_engine vllm: the teacher is the student's base, which answers in the training processes; leave the option out."
        )
    if args.gkd_teacher_engine == 'vllm' and importlib.util.find_spec('vllm') is None:
        raise OptionError('--gkd_teacher_engine vllm: vLLM is not installed; pip install vllm, or leave the option out.')


# Models whose log-probabilities in vLLM 0.32 are the student's as it loads them itself (5e-6), and are not once ms-swift 4.6.0 has sent it
# weights (off by more than 4). Seen on a CPU, the only place where it was tried.
NOT_IN_STEP_WITH_VLLM = ('qwen3_omni_moe',)


def check_student_engine(args: Any) -> None:
    """Raises:
    OptionError: ``--use_vllm true`` without vLLM, with a student that it does not follow, or, colocated, with one of which it has no
        implementation, neither its own nor by way of transformers. A server has loaded the student before.
    """
    if not args.use_vllm:
        return
    instead = 'leave --use_vllm out, and the student answers with transformers'
    if importlib.util.find_spec('vllm') is None:
        raise OptionError(f'--use_vllm true: vLLM is not installed; pip install vllm, or {instead}.')
    import transformers

    config = transformers.AutoConfig.from_pretrained(args.model_dir, trust_remote_code=True)
    if args.vllm_mode == 'colocate':
        import vllm

        names = config.architectures or []
        classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        runs = bool(set(names) & set(vllm.ModelRegistry.get_supported_archs()) or getattr(config, 'auto_map', None))
        by_transformers = any(c.is_backend_compatible() or c._can_set_attn_implementation() for c in classes)
        if not (runs or by_transformers):
            raise OptionError(f'--use_vllm true: vLLM {vllm.__version__} does not know the architecture {", ".join(names)}; {instead}.')
    if config.model_type in NOT_IN_STEP_WITH_VLLM:
        raise OptionError(
            f"--use_vllm true: {config.model_type} in vLLM was not the student after ms-swift's weight sync (on a CPU); {instead}."
        )


def check_size(num_rows: int, generation_batch: int, explained: str) -> None:
    """Raises:
    OptionError: The dataset is smaller than one generation batch.
    """
    if num_rows < generation_batch:
        raise OptionError(
            f'--dataset has {num_rows} rows, fewer than one generation batch of {generation_batch} ({explained}); use more '
            'rows or smaller batches.'
        )


def same_weights(args: Any, teacher: str) -> bool:
    """Whether a model id or directory names the weights that the student starts from."""
    if teacher == args.model:
        return args.teacher_model_revision in (None, args.model_revision)
    own = [path for path in (args.model, args.model_dir) if path and os.path.isdir(path)]
    teacher = os.path.expanduser(teacher)
    if not os.path.isdir(teacher):
        if not os.path.isdir(os.path.expanduser(args.model)):
            return False  # two models of a hub
        teacher = _directory(args, teacher)
    return os.path.realpath(teacher) in [os.path.realpath(path) for path in own]


def _directory(args: Any, teacher: str) -> str:
    """Where ms-swift keeps a model of a hub, without its weights if they aren't there yet."""
    from swift.utils import safe_snapshot_download

    return safe_snapshot_download(
        teacher, revision=args.teacher_model_revision, download_model=False, use_hf=args.use_hf, hub_token=args.hub_token
    )


def teacher_sees_more(args: Any, dataset: Any) -> bool:
    """Whether the teacher is asked something else than the student; assumed of a dataset whose columns are not known."""
    columns = getattr(dataset, 'column_names', None)
    privileged = columns is None or bool({'teacher_prompt', 'teacher_images'} & set(columns))
    own_view = (args.gkd_teacher_system, args.gkd_teacher_enable_thinking, args.gkd_feedback)
    return privileged or any(value is not None for value in own_view)


# Ways to initialise LoRA that subtract what the adapter starts with from the base (peft 0.20, tuners/lora/layer.py).
CHANGES_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora-ga', 'lora_ga')


def local(args: Any, adapter: str) -> str:
    """The directory of an adapter, as ms-swift finds it."""
    from swift.utils import safe_snapshot_download

    return safe_snapshot_download(adapter, use_hf=args.use_hf, hub_token=args.hub_token)


def adapter_config(path: str) -> dict[str, Any]:
    """What PEFT wrote beside an adapter; empty for other checkpoints."""
    file = os.path.join(path, 'adapter_config.json')
    if not os.path.exists(file):
        return {}
    with open(file, encoding='utf-8') as opened:
        return json.load(opened)


def base_of_adapters(args: Any, teacher: str | None, can_share: bool) -> str | None:
    """``--teacher_model``; the student's, with its type and revision, where only ``--teacher_adapters`` are given.

    Args:
        teacher: ``--teacher_model`` as it was given.
        can_share: Whether the student has an adapter, so that both begin at one base.

    Raises:
        OptionError: Nobody can tell whose adapters they are, or the student itself is to teach.
    """
    own, adapters = args.gkd_self_teacher, args.teacher_adapters
    if adapters and own is not None:
        raise OptionError(f'--gkd_self_teacher {own} and --teacher_adapters {adapters[0]}: give one of them.')
    if adapters and teacher is None:
        if not can_share:
            raise OptionError(f'--teacher_adapters {adapters[0]} without --teacher_model: name the model that they belong to.')
        args.teacher_model_type = args.teacher_model_type or args.model_type
        args.teacher_model_revision = args.teacher_model_revision or args.model_revision
        return args.model
    return teacher


def check_reference(args: Any, why: str | None) -> None:
    """
    Args:
        why: Why the student's adapter can't be switched off, or leaves something else than the base; None if it can.

    Raises:
        OptionError: ``--gkd_extrapolation`` without a base to begin at.
    """
    if extrapolates(args) and why is not None:
        raise OptionError(f'--gkd_extrapolation {args.gkd_extrapolation} with {why}')


def teacher_is_start(args: Any) -> bool:
    """Whether a separate teacher is a frozen copy of the weights that full training starts from; a LoRA-like tuner would share them."""
    separate = args.teacher_model is not None and not args.teacher_adapters
    return separate and args.tuner_type == 'full' and args.teacher_quant_method in (None, 'none') and same_weights(args, args.teacher_model)


def teaches_as_base(args: Any, teacher: str | None, can_switch_off: bool) -> bool:
    """Whether the teacher is the student's base with its adapter off.

    Args:
        teacher: ``--teacher_model`` as it was given.
        can_switch_off: Whether the student's tuner is one that can be switched off for a forward.

    Raises:
        OptionError: ``--gkd_self_teacher`` contradicts ``--teacher_model``, or there is no adapter to switch off.
    """
    shared = can_switch_off and not args.teacher_adapters and teacher is not None and same_weights(args, teacher)
    how = args.gkd_self_teacher
    if how is None:
        return shared
    if teacher is not None and not (how == 'base' and shared):
        raise OptionError(f'--gkd_self_teacher {how} and --teacher_model {teacher}: give one of them.')
    if how == 'base' and not can_switch_off:
        raise OptionError(f'--gkd_self_teacher base with --tuner_type {args.tuner_type}: there is no adapter to switch off; use lora.')
    return how == 'base'
