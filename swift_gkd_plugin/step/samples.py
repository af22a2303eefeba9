"""From rows to the tensors of a micro-batch: the student's view, the teacher's view, and the tokens that are trained.

Both views hold the same response tokens, each under its own prompt. The n trained tokens of a micro-batch are numbered row by row;
every per-token tensor in here and in the loss is in that order, whatever the layout of the batch (padded or packed).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from swift.dataset import RowPreprocessor
from swift.rl_core.data import GKDSample
from swift.rlhf_trainers.utils import encode_sample, get_response_prefix_ids
from swift.utils import remove_response

from ..arguments import OptionError, has_rewards
from ..responses import Response
from ..responses.local import inference_template, never_sampled
from ..rewards import Reward, has_passed
from ..sources import DATASET, STUDENT, TEACHER, Source
from ..teachers import Signal
from ..teachers.server import MEDIA, Question, Scores, as_request
from .continuation import IGNORED, Continuation
from .data import Row
from .said import how_to_find

# What `SampleEncoder.row_with_response` writes beside ms-swift's columns.
RESPONSE_COLUMNS = ('response_token_ids', 'add_eos')


def with_used_columns(args, load: Callable[[], tuple]) -> tuple:
    """The training and the validation dataset of ``load``, which is ms-swift's; None for a file without a row.

    They keep the columns of ms-swift's format, those of saved responses, and the tags of teacher servers; all columns where the user says
    so, and where a scheduler, a server or a reward function is given whole rows.
    """
    removes = args.remove_unused_columns
    args.remove_unused_columns = False  # ms-swift's default would drop columns of ours
    try:
        datasets = load()
    except StopIteration:  # what ms-swift makes of a file without a row
        return None, None
    finally:
        args.remove_unused_columns = removes
    if not removes or args.vllm_server_pass_dataset or args.multi_turn_scheduler or args.use_gym_env or has_rewards(args):
        return datasets
    used = {*RowPreprocessor.standard_keys, *RESPONSE_COLUMNS, args.teacher_tag_key}
    return tuple(_selected(dataset, used) for dataset in datasets)


def _selected(dataset, used: set[str]):
    columns = getattr(dataset, 'column_names', None)
    if not columns:
        return dataset
    kept = [name for name in columns if name in used]
    return dataset if kept == list(columns) else dataset.select_columns(kept)


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """[n] positions, in the flattened [batch * sequence], of the hidden states that predict the trained tokens of ``labels``.

    A token is predicted by the position before it. The labels are not rolled: that would have a row's first token predicted by the
    row's last position.
    """
    row, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return row * labels.shape[1] + position


@dataclass
class Sample:
    """A row, the source that it drew, and the response once there is one.

    Attributes:
        row: Number, epoch and whether it counts.
        content: The row's own content, or that of the row that stands in for it.
        source: Who answers.
        response: The generated response; None for the dataset's.
        generated: The sample as ms-swift's rollout returned it, for what only that knows (several turns, loss masks, media).
        encoded: The student's view of a dataset response, encoded when it was checked.
        prompts: The encoded prompts of both views, the teacher's if it differs, likewise; until the response is encoded.
        prompt_ids: The student's prompt as token ids, of a response that is generated.
        views: Both views, once they were encoded for a step.
        generated_at: Number of optimizer steps that were done when the response was generated.
        divergence: [2], sum and number over its trained tokens on this rank, once their loss was computed.
        scores: What the teacher's server said about each token of the response while it answered.
        question: What it is asked about the trained tokens; None without a server.
        asked: What it will say about them, where the question is on its way.
        reward: What the response is worth, of the student's where there are reward functions.
        feedback: What the teacher is asked about the response in place of the row's last question; None for what it would be asked anyway.
        old_logprobs: [n] float32, of its trained tokens under the student that gave it, if a later one learns from it.
        attempt: 0 for the row's own content, n for that of the n-th row that was drawn in its place.
        unfit: Why the row's own content cannot be encoded; None if it can.
    """

    row: Row
    content: dict[str, Any] = field(repr=False)
    source: Source = DATASET
    response: Response | None = None
    generated: GKDSample | None = field(default=None, repr=False)
    encoded: dict[str, Any] | None = field(default=None, repr=False)
    prompts: tuple[dict[str, Any], dict[str, Any] | None] | None = field(default=None, repr=False)
    prompt_ids: list[int] | None = field(default=None, repr=False)
    views: tuple[dict[str, Any], dict[str, Any] | None] | None = field(default=None, repr=False)
    generated_at: int | None = None
    divergence: torch.Tensor | None = field(default=None, repr=False)
    scores: Scores | None = field(default=None, repr=False)
    question: Question | None = field(default=None, repr=False)
    asked: Future | None = field(default=None, repr=False)
    reward: Reward | None = None
    feedback: str | None = field(default=None, repr=False)
    old_logprobs: torch.Tensor | None = field(default=None, repr=False)
    attempt: int = 0
    unfit: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it was encoded as far as its source needs."""
        return not self.row.counts or self.encoded is not None or self.prompts is not None

    @property
    def prompt(self) -> dict[str, Any]:
        """That of the model that is to answer."""
        student, teacher = self.prompts
        return teacher if self.source == TEACHER and teacher is not None else student

    def take_feedback(self, text: str, prompt: dict[str, Any] | None = None) -> None:
        """The response has its feedback, from before it is encoded.

        Args:
            prompt: The teacher's prompt with it, encoded for generation; None if it is not at hand.
        """
        self.feedback = text
        if self.prompts is not None:
            self.prompts = self.prompts[0], prompt

    def leave_shared_memory(self) -> Sample:
        """Take over what a worker process has encoded. Its tensors keep a file descriptor each for as long as they live, in a
        memory that is small in containers."""
        copies: dict[int, torch.Tensor] = {}

        def own(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_shared() and not value.is_cuda:
                return copies.setdefault(id(value), value.clone())
            if isinstance(value, dict):
                return {name: own(one) for name, one in value.items()}
            if isinstance(value, tuple) or (isinstance(value, list) and value and not isinstance(value[0], int | float)):
                return type(value)(map(own, value))
            return value

        self.encoded, self.prompts, self.views = own(self.encoded), own(self.prompts), own(self.views)
        return self

    def leave_out(self) -> None:
        """Make it a filler, which keeps the ranks in step and weighs nothing."""
        self.row, self.content, self.source = self.row.filler(), self.row.content, DATASET
        self.encoded = self.views = self.prompts = None

    def digest(self) -> str:
        """Of what the models see of it: row, source, token ids and the shapes of everything else."""
        seen = hashlib.blake2b(repr((self.row.key, self.row.counts, self.source)).encode(), digest_size=7)
        for view in self.views:
            for name, value in sorted((view or {}).items()):
                text = tuple(value.shape) if isinstance(value, torch.Tensor) else value if isinstance(value, list) else type(value).__name__
                seen.update(f'{name} {text}'.encode())
        return seen.hexdigest()

    def __str__(self) -> str:
        return f'row {self.row.number} of epoch {self.row.epoch} ({self.source}) {how_to_find(self.content)}'

    def of_row(self) -> str:
        """As ``str``, of the row's own content where another row's stands in."""
        return str(replace(self, content=self.row.content))


def response_turns(result: GKDSample) -> list[tuple[list[int], list[int]]]:
    """The ids of each turn of a response, and for each of them whether the student sampled it (1), or a scheduler or the template put it in
    between (0)."""
    turns = result.response_token_ids
    if not turns or isinstance(turns[0], int):
        return [(list(turns), [1] * len(turns))]
    return list(zip(turns, result.response_loss_mask or [[1] * len(turn) for turn in turns], strict=True))


def sampled_turns(result: GKDSample) -> list[list[int]]:
    """What the student sampled in each turn of ms-swift's rollout."""
    return [[token for token, kept in zip(ids, mask, strict=True) if kept] for ids, mask in response_turns(result)]


def sampled_ids(result: GKDSample) -> list[int]:
    """What the student sampled, over all turns."""
    return list(itertools.chain.from_iterable(sampled_turns(result)))


def without_media(result: GKDSample, template) -> GKDSample:
    """The rollout's sample up to the first id of a medium that the student sampled; itself if there is none. What a scheduler put in
    between may hold such ids."""
    never, turns = set(never_sampled(template)), response_turns(result)
    places = ((k, i) for k, turn in enumerate(turns) for i, (token, kept) in enumerate(zip(*turn, strict=True)) if kept and token in never)
    turn, place = next(places, (None, 0))
    if turn is None:
        return result
    cut = copy.copy(result)

    def upto(parts: list[list[Any]]) -> list[list[Any]]:  # nothing, or only of the last turn, where a scheduler left it out
        return [*parts[:turn], parts[turn][:place]] if parts and len(parts) == len(turns) else []

    cut.response_token_ids, cut.finish_reason = upto([ids for ids, _ in turns]), 'length'
    cut.response_loss_mask, cut.rollout_logprobs = upto(result.response_loss_mask), upto(result.rollout_logprobs)
    answers = [i for i, message in enumerate(result.messages) if message['role'] == 'assistant'][-len(turns) :]
    text = template.safe_decode(cut.response_token_ids[-1])
    cut.messages = [*result.messages[: answers[turn]], {**result.messages[answers[turn]], 'content': text}]
    later = ''.join(str(message['content']) for message in result.messages[answers[turn] + 1 :])
    for kind in MEDIA:
        shown_later = later.count(f'<{kind[:-1]}>')
        if shown_later:
            setattr(cut, kind, getattr(result, kind)[:-shown_later])
            if kind in cut.rollout_infos:
                cut.rollout_infos = {**cut.rollout_infos, kind: getattr(cut, kind)}
    return cut


def _runs_of_ids(inner: GKDSample) -> int:
    """How many runs of trained tokens its response ids are; they are the last ones."""
    return sum(bool(kept) and not before for _, mask in response_turns(inner) for before, kept in itertools.pairwise([0, *mask]))


def check_one_each(made: int, asked: int, scheduler: str | None) -> None:
    """Raises:
    OptionError: A scheduler, of this name or (None) of the server, has made another number of samples than it was given.
    """
    if made != asked:
        raise OptionError(
            f'--multi_turn_scheduler {scheduler or "of the server"}: it made {made} samples of {asked}, but a row stays one sample in '
            'distillation; return one RolloutOutput for each request from its run().'
        )


@dataclass(frozen=True)
class TeacherView:
    """What the teacher sees of a row, where that differs from what the student sees.

    Attributes:
        system: System prompt in place of the row's; None keeps it.
        enable_thinking: Thinking mode in place of the template's; None keeps it.
    """

    system: str | None = None
    enable_thinking: bool | None = None

    def differs(self, sample: GKDSample) -> bool:
        return (
            bool(sample.teacher_prompt) or sample.teacher_images is not None or self.system is not None or self.enable_thinking is not None
        )

    def of(self, sample: GKDSample) -> GKDSample:
        """The sample as the teacher sees it: privileged prompt and images (columns ``teacher_prompt``, ``teacher_images``)."""
        view = copy.copy(sample)
        view.messages = [dict(m) for m in sample.messages]
        if sample.teacher_prompt:
            question = view.messages
            turns = sample.response_token_ids
            if turns and isinstance(turns[0], list):  # of a multi-turn scheduler, whose own questions come after the first answer
                question = question[: [i for i, m in enumerate(question) if m['role'] == 'assistant'][-len(turns)]]
            last_user = max(i for i, m in enumerate(question) if m['role'] == 'user')
            view.messages[last_user]['content'] = sample.teacher_prompt
        if sample.teacher_images is not None:
            view.images = sample.teacher_images
        if self.system is not None:
            view.messages = [m for m in view.messages if m['role'] != 'system']
            if self.system:
                view.messages.insert(0, {'role': 'system', 'content': self.system})
        if self.enable_thinking is not None:
            template_kwargs = {**(sample.extra.get('chat_template_kwargs') or {}), 'enable_thinking': self.enable_thinking}
            view.extra = {**sample.extra, 'chat_template_kwargs': template_kwargs}
        return view


@dataclass
class Counted:
    """A micro-batch before its turn: encoded and counted, not yet collated.

    Attributes:
        samples: In batch order.
        lengths: How many trained tokens each sample has.
        size: Tokens of the student's inputs, with the padding of rows of different lengths.
        signal: What the teacher says about the trained tokens, if that is known before the turn.
    """

    samples: list[Sample]
    lengths: list[int]
    size: int
    signal: Signal | None = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass
class MicroBatch:
    """One forward's worth of samples.

    Attributes:
        samples: In batch order.
        student_inputs, teacher_inputs: Keyword arguments of the two forwards; ``teacher_inputs`` is None if they are the same.
        student_index, teacher_index: [n] int64, positions in the flattened [batch * sequence] of the hidden state that predicts
            trained token i.
        labels: [n] int64, the trained tokens.
        weights: [n] float32, ``loss_scale`` of each token (1 without one).
        imitated: [n] float32, 1 where the cross-entropy applies: the student didn't generate the token.
        lengths: How many of the n tokens each sample has.
        signal: What the teacher says about the n tokens, once it is known.
        advantages: [n] float32, of the response that the token is in, 0 where it has none; None without rewards.
        compared: [n] float32, 1 where the teacher's opinion counts, 0 where it does not; None if it always does.
        old_logprobs: [n] float32, log-probabilities under the student that sampled the tokens, NaN where it is the student of now; None if
            it always is.
    """

    samples: list[Sample]
    student_inputs: dict[str, Any] = field(repr=False)
    teacher_inputs: dict[str, Any] | None = field(repr=False)
    student_index: torch.Tensor = field(repr=False)
    teacher_index: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)
    weights: torch.Tensor = field(repr=False)
    imitated: torch.Tensor = field(repr=False)
    lengths: list[int] = field(repr=False)
    signal: Signal | None = field(default=None, repr=False)
    advantages: torch.Tensor | None = field(default=None, repr=False)
    compared: torch.Tensor | None = field(default=None, repr=False)
    old_logprobs: torch.Tensor | None = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.labels)

    def as_student_sees(self) -> MicroBatch:
        """The same for a teacher that sees what the student does."""
        return replace(self, teacher_inputs=None, teacher_index=self.student_index)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, what the teacher says included. The host waits for no copy to a GPU."""

        def move(value):
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(map(move, value))
            if isinstance(value, Signal):
                return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
            if not isinstance(value, torch.Tensor):
                return value
            if device.type == 'cuda' and value.device.type == 'cpu':
                value = value.pin_memory()  # of other memory only a part can wait for its turn in the GPU's queue
            return value.to(device, non_blocking=True)

        stays = ('samples', 'lengths')
        return MicroBatch(**{name: value if name in stays else move(value) for name, value in vars(self).items()})


class InTurn:
    """Micro-batches, each collated when its turn comes and kept by nobody here.

    Args:
        counted: Something of each.
        collated: Makes the micro-batch of it.
    """

    def __init__(self, counted: list[Any], collated: Callable[[Any], MicroBatch]):
        self.counted, self._collated = counted, collated

    def __len__(self) -> int:
        return len(self.counted)

    def __iter__(self) -> Iterator[MicroBatch]:
        for one in self.counted:
            yield self._collated(one)


class SampleEncoder:
    """Encodes samples with ms-swift's template.

    Args:
        template: The student's template.
        teacher_view: How the teacher's view differs.
        needs_teacher: Whether any teacher looks at the samples.
        tag_key: The column that tells which of several teacher servers a row belongs to; None without a server.
        with_rewards: Whether rewards are in the loss.
        sampled: Whether the teacher is asked about tokens that the student sampled only.
        distilled: Which rewarded responses are compared with the teacher, as ``LossOptions`` has it.
    """

    def __init__(
        self,
        template,
        teacher_view: TeacherView,
        needs_teacher: bool = True,
        tag_key: str | None = None,
        with_rewards: bool = False,
        sampled: bool = False,
        distilled: tuple[str, float] = ('all', 1.0),
    ):
        self.template, self.teacher_view, self.needs_teacher, self.tag_key = template, teacher_view, needs_teacher, tag_key
        self.with_rewards, self.sampled, self.distilled = with_rewards, sampled, distilled
        self._continue = Continuation(template)

    @contextmanager
    def _limit(self, max_length: int | None) -> Iterator[None]:
        before, self.template.max_length = self.template.max_length, max_length
        try:
            yield
        finally:
            self.template.max_length = before

    def check(self, sample: Sample) -> None:
        """Raise if the sample can't be encoded for its source; keep what was encoded.

        With ``--truncation_strategy delete`` that includes more than ``max_length`` tokens: of prompt and response for the
        dataset's, of the prompt alone for a response that is still to be generated.
        """
        if sample.source == DATASET:
            if sample.content['messages'][-1]['role'] != 'assistant':
                raise ValueError('the row has no response')
            sample.encoded = self._encode(self.inner(sample))
        else:
            teacher, raises = None, self.template.truncation_strategy == 'raise'
            with inference_template(self.template) as template:
                student = template.encode(self.student_prompt(sample))
                if (self.needs_teacher or sample.source == TEACHER) and self.teacher_view.differs(self.inner(sample)):
                    # What the teacher only looks at may be longer than what is trained.
                    with self._limit(None if sample.source == STUDENT and raises else template.max_length):
                        teacher = template.encode(self.teacher_prompt(sample))
            sample.prompts, sample.prompt_ids = (student, teacher), student['input_ids']

    def take(self, sample: Sample, result: GKDSample) -> None:
        """What ms-swift's rollout has generated for a sample. Its engines may sample what :func:`never_sampled` keeps ours from."""
        result = without_media(result, self.template)
        sample.generated, sample.response = result, Response(sampled_ids(result), result.finish_reason or 'stop')

    def cut_before_media(self, sample: Sample) -> None:
        """The same for what a teacher server has answered."""
        never, ids = never_sampled(self.template), sample.response.token_ids
        place = next((i for i, token in enumerate(ids) if token in never), None)
        if place is not None:
            sample.response, scores = Response(ids[:place], 'length'), sample.scores
            sample.scores = scores and Scores(scores.logprobs[:place], scores.ids[:place])

    @staticmethod
    def inner(sample: Sample) -> GKDSample:
        """ms-swift's sample with the row's own content; a copy that may be changed."""
        return GKDSample.from_row(sample.content)

    def student_prompt(self, sample: Sample) -> dict[str, Any]:
        """Inputs of ``template.encode`` for the student's answer to this sample."""
        return self._prompt(self.inner(sample))

    def teacher_prompt(self, sample: Sample) -> dict[str, Any]:
        """Inputs of ``template.encode`` for the teacher's answer to this sample, from its own view."""
        return self._prompt(self.teacher_view.of(self.inner(sample)))

    @staticmethod
    def _prompt(inner: GKDSample) -> dict[str, Any]:
        inputs = inner.to_template_dict()
        inputs.pop('add_eos', None)
        remove_response(inputs['messages'])
        return inputs

    def for_feedback(self, sample: Sample) -> tuple[str, str]:
        """The response as a reward function reads it, and the question that the teacher is asked without a feedback."""
        inner = self.inner(sample)
        remove_response(inner.messages)
        question = inner.teacher_prompt or next((m['content'] for m in reversed(inner.messages) if m['role'] == 'user'), '')
        return self.for_reward(sample).messages[-1]['content'], question

    def columns(self, sample: Sample) -> dict[str, Any]:
        """Of the row, with the prompt as its ``messages``."""
        inner = self.inner(sample)
        remove_response(inner.messages)
        return {**sample.content, 'messages': inner.messages}

    def prompt_with_feedback(self, sample: Sample, text: str) -> dict[str, Any] | None:
        """The teacher's prompt with a feedback, encoded for generation; None if a scheduler has had a conversation of its own.

        Raises:
            Exception: What ms-swift's template raises; a ValueError if it is longer than ``max_length``. No part of it is cut off: it would
                be one of the question or of what the feedback says.
        """
        with self._limit(None):
            if self._answers_the_row(sample):
                inner = self.inner(sample)
                inner.teacher_prompt = text
                with inference_template(self.template) as template:
                    prompt = template.encode(self._prompt(self.teacher_view.of(inner)))
                length = len(prompt['input_ids'])
            else:
                prompt, whole = None, self._encode(self.teacher_view.of(self._with_feedback(self._answered(sample), text)))
                length = next((i for i, token in enumerate(whole['labels']) if token != IGNORED), len(whole['labels']))
        if self.template.max_length is not None and length > self.template.max_length:
            raise ValueError(f'it has {length} tokens, more than --max_length {self.template.max_length}')
        return prompt

    @staticmethod
    def _with_feedback(inner: GKDSample, text: str | None) -> GKDSample:
        if text is not None:
            inner = copy.copy(inner)
            inner.teacher_prompt = text
        return inner

    def _answered(self, sample: Sample) -> GKDSample:
        """ms-swift's sample with the response in it, as token ids where it was generated."""
        if sample.generated is not None:
            return sample.generated
        inner = self.inner(sample)
        if sample.response is not None:
            remove_response(inner.messages)
            text = self.template.safe_decode(sample.response.token_ids)
            inner.messages.append({'role': 'assistant', 'content': text if sample.response.token_ids else ''})
            inner.response_token_ids = sample.response.token_ids
            inner.add_eos = False
        return inner

    def _encode(self, inner: GKDSample) -> dict[str, Any]:
        """``template.encode``, with what the prompt of a generation call ends with (an empty think block, say) untrained. Before token ids
        ms-swift puts it itself, and a model may have sampled it once more."""
        encoded = encode_sample(inner, self.template)
        encoded.pop('_extra_kwargs', None)
        prefix = self._response_prefix(inner)
        if prefix:
            ids, labels = encoded['input_ids'], encoded['labels']
            starts = [i for i in range(1, len(labels)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
            for start in starts[: len(starts) - _runs_of_ids(inner)]:
                if ids[start : start + len(prefix)] == prefix:
                    labels[start : start + len(prefix)] = [IGNORED] * len(prefix)
        return encoded

    def _response_prefix(self, inner: GKDSample) -> list[int] | None:
        """What the prompt of a generation call ends with, after the header of the answer."""
        return get_response_prefix_ids(self.template, chat_template_kwargs=inner.extra.get('chat_template_kwargs') or {})

    def _response_limit(self, sample: Sample) -> int | None:
        """Length limit under which a generated response is encoded: that of its prompt, and the response on top."""
        if self.template.max_length is None or self.template.truncation_strategy == 'raise':
            return None  # the prompt was checked
        return self.template.max_length + sum(len(ids) for ids, _ in response_turns(self._answered(sample)))

    def views(self, sample: Sample) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The encoded student's view, and the teacher's if it differs, with the same trained tokens. Encoded once."""
        if sample.views is None:
            sample.views, sample.prompts = self._views(sample), None
        return sample.views

    def _views(self, sample: Sample) -> tuple[dict[str, Any], dict[str, Any] | None]:
        inner = self._with_feedback(self._answered(sample), sample.feedback)
        if not sample.row.counts:
            student = self._filler(inner)
        elif sample.source == DATASET:
            student = dict(sample.encoded)
        else:
            student = self._generated(sample, 0, inner)
        if not sample.row.counts or not self.needs_teacher or not self.teacher_view.differs(inner):
            return student, None
        if sample.source == DATASET:
            with self._limit(None):
                teacher = self._encode(self.teacher_view.of(inner))
        else:
            teacher = self._generated(sample, 1, self.teacher_view.of(inner))
        teacher['labels'] = self._matching_labels(sample, student['labels'], teacher['labels'])
        return student, teacher

    def _generated(self, sample: Sample, which: int, view: GKDSample) -> dict[str, Any]:
        """A generated response under the student's (0) or the teacher's (1) prompt."""

        def encode() -> dict[str, Any]:
            with self._limit(self._response_limit(sample)):
                return self._encode(view)

        prompt = sample.prompts[which] if sample.prompts is not None and self._answers_the_row(sample) else None
        return self._continue(prompt, view, encode)

    def _answers_the_row(self, sample: Sample) -> bool:
        """Whether the response is to the row as it is; a scheduler may have asked something else, or shown other media."""
        if sample.generated is None:
            return True
        asked, inner = sample.generated, self.inner(sample)
        remove_response(inner.messages)
        return asked.messages[:-1] == inner.messages and all(getattr(asked, kind) == getattr(inner, kind) for kind in MEDIA)

    def _filler(self, inner: GKDSample) -> dict[str, Any]:
        """A row's prompt, or any if it can't be encoded, with nothing to train on."""
        remove_response(inner.messages)
        inner.messages.append({'role': 'assistant', 'content': ''})
        with self._limit(None):
            try:
                encoded = self._encode(inner)
            except Exception:  # see Cycle._attempts
                encoded = self._encode(GKDSample.from_row({'messages': [{'role': 'user', 'content': 'a'}, inner.messages[-1]]}))
        return {**encoded, 'labels': [IGNORED] * len(encoded['labels'])}

    def _matching_labels(self, sample: Sample, student: list[int], teacher: list[int]) -> list[int]:
        """The teacher's labels, reduced to the tokens that the student trains on (a truncated student view has fewer)."""
        wanted = [t for t in student[1:] if t != IGNORED]
        positions = [i for i, t in enumerate(teacher) if i and t != IGNORED]
        kept = positions[: len(wanted)] if self.template.truncation_strategy == 'right' else positions[len(positions) - len(wanted) :]
        if [teacher[i] for i in kept] != wanted:
            raise ValueError(
                f"{sample}: the response is {len(wanted)} tokens under the student's prompt and {len(positions)} other tokens under "
                "the teacher's; both must tokenize it alike (check teacher_prompt and the thinking options)."
            )
        kept = set(kept)
        return [t if i in kept else IGNORED for i, t in enumerate(teacher)]

    def counted(self, samples: list[Sample]) -> Counted:
        """Encode, on the CPU; a teacher's server can be asked about it."""
        encoded = [self.views(sample)[0] for sample in samples]
        if self.needs_teacher:
            self.ask(samples)
        trained = list(map(self.trained_tokens, samples))
        rows = [len(one['input_ids']) for one in encoded]
        return Counted(samples, trained, sum(rows) if self.template.padding_free else len(rows) * max(rows, default=0))

    def trained_tokens(self, sample: Sample) -> int:
        return sum(token != IGNORED for token in self.views(sample)[0]['labels'][1:])

    def micro_batch(self, samples: list[Sample]) -> MicroBatch:
        """Encode and collate, on the CPU. A teacher's view for one sample means one for all of them."""
        views = [self.views(sample) for sample in samples]
        student = [dict(s) for s, _ in views]
        teacher = [dict(t or s) for s, t in views] if any(t for _, t in views) else None
        labels, weights, imitated, lengths = [], [], [], []
        for sample, encoded in zip(samples, student, strict=True):
            scale = encoded.pop('loss_scale', None) or [1.0] * len(encoded['labels'])
            for token, weight in zip(encoded['labels'][1:], scale[1:], strict=True):
                if token != IGNORED:
                    labels.append(token)
                    weights.append(weight)
                    imitated.append(float(sample.source != STUDENT))
            lengths.append(len(labels) - sum(lengths))
        for encoded in teacher or ():
            encoded.pop('loss_scale', None)
        student_inputs, student_index = self._collate(student, samples, len(labels))
        teacher_inputs, teacher_index = self._collate(teacher, samples, len(labels)) if teacher else (None, student_index)
        return MicroBatch(
            samples,
            student_inputs,
            teacher_inputs,
            student_index,
            teacher_index,
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor(imitated, dtype=torch.float32),
            lengths,
            advantages=_advantages(samples, lengths) if self.with_rewards else None,
            compared=self._compared(samples, lengths),
            old_logprobs=_old_logprobs(samples, lengths),
        )

    def _compared(self, samples: list[Sample], lengths: list[int]) -> torch.Tensor | None:
        which, passing = self.distilled
        if which == 'all' or not any(sample.reward for sample in samples):
            return None
        passed = [None if sample.reward is None else has_passed(sample.reward.total, passing) for sample in samples]
        return _per_token([float(one is None or one == (which == 'passed')) for one in passed], lengths)

    def _text(self, response: Response) -> str:
        """For people: without the token that ends it."""
        return self.template.safe_decode(response.token_ids if response.cut_off else response.token_ids[:-1])

    def for_reward(self, sample: Sample) -> GKDSample:
        """ms-swift's sample with the response as a reward function reads it."""
        answered = copy.copy(self._answered(sample))
        if sample.generated is None:
            answered.messages = [*answered.messages[:-1], {'role': 'assistant', 'content': self._text(sample.response)}]
            answered.finish_reason = sample.response.finish_reason
        answered.prompt_id = f'{sample.row.epoch}-{sample.row.number}'
        answered.request_id = f'{answered.prompt_id}-{sample.row.repeat}'
        return answered

    def teacher_length(self, sample: Sample) -> int:
        """Tokens of the teacher's view."""
        student, teacher = self.views(sample)
        return len((teacher or student)['input_ids'])

    def teacher_batch(self, samples: list[Sample]) -> MicroBatch:
        """What the teacher sees of samples from any micro-batches, as a micro-batch in which it is the student's view too."""
        encoded = [dict(teacher or student) for student, teacher in map(self.views, samples)]
        for one in encoded:
            one.pop('loss_scale', None)
        trained = [[t for t in one['labels'][1:] if t != IGNORED] for one in encoded]
        labels = torch.tensor(list(itertools.chain.from_iterable(trained)), dtype=torch.int64)
        inputs, index = self._collate(encoded, samples, len(labels))
        ones = torch.ones(len(labels))
        return MicroBatch(samples, inputs, None, index, index, labels, ones, ones, list(map(len, trained)))

    def row_with_response(self, sample: Sample) -> dict[str, Any]:
        """The row as a row of ms-swift's dataset format, with the response that was generated for it: the text for people, the ids so
        that training on the row is training on these very tokens."""
        inner, ids = self.inner(sample), sample.response.token_ids
        remove_response(inner.messages)
        media = {kind: values for kind in MEDIA if (values := getattr(inner.to_infer_request(), kind))}
        text = self._text(sample.response)
        messages = [*inner.messages, {'role': 'assistant', 'content': text}]
        kept = {k: v for k, v in sample.content.items() if v is not None}
        return {**kept, **media, 'messages': messages, **dict(zip(RESPONSE_COLUMNS, (ids, False), strict=True))}

    def ask(self, samples: Iterable[Sample]) -> None:
        """Give each sample its question for a teacher server, if there is one."""
        for sample in samples:
            if self.tag_key is not None and sample.question is None and (sample.source == STUDENT or not self.sampled):
                student, teacher = self.views(sample)
                sample.question = self.question(sample, teacher or student)

    def question(self, sample: Sample, encoded: dict[str, Any], prompt_only: bool = False) -> Question:
        """A sample as a teacher server is asked about it.

        Args:
            encoded: The teacher's view, or its prompt.
            prompt_only: The server is to answer it.
        """
        ids, labels = list(encoded['input_ids']), encoded.get('labels') or []
        positions = [] if prompt_only else [i for i, t in enumerate(labels) if i and t != IGNORED]
        view = self.teacher_view.of(self._with_feedback(self._answered(sample), sample.feedback))
        view.request_id = str(sample.row.number)
        tag = view.get_tag(self.tag_key)
        request = view.to_infer_request()
        if prompt_only:
            remove_response(request.messages)
        elif positions:
            start, trained = positions[-1], set(positions)
            while start - 1 in trained:
                start -= 1
            prefix = self._response_prefix(view)
            if prefix and ids[start - len(prefix) : start] == prefix:  # the server's template takes it as a part of the response
                start -= len(prefix)
            # The last response as the ids that are trained, with what follows them; it is not tokenized again.
            request.messages[-1] = {'role': 'assistant', 'content': {'token_ids': ids[start:]}}
            request.add_eos = False
        return Question(ids, positions, self._compact(ids), as_request(request), tag)

    def _compact(self, ids: list[int]) -> list[int]:
        """One placeholder where the template has put as many as a medium has patches or frames."""
        placeholders = set(self.template.placeholder_tokens)
        return [t for i, t in enumerate(ids) if not (t in placeholders and i and ids[i - 1] == t)]

    def _collate(self, encoded: list[dict[str, Any]], samples: list[Sample], num_tokens: int) -> tuple[dict[str, Any], torch.Tensor]:
        # Collators extend lists where they are (ms-swift 4.6.0, template/base.py:1672), and these are used for other batches too.
        inputs = self.template.data_collator([{k: list(v) if isinstance(v, list) else v for k, v in one.items()} for one in encoded])
        labels = inputs.pop('labels')
        inputs.pop('channel', None)
        index = predicting_positions(labels)
        if len(index) != num_tokens:
            raise RuntimeError(
                f'{len(index)} trained tokens after collating, {num_tokens} before ({", ".join(map(str, samples))}); '
                'please report the model type and this line.'
            )
        return inputs, index


def _per_token(of_samples: list[float], lengths: list[int]) -> torch.Tensor:
    """[n] float32, a number of each sample for each of its tokens."""
    return torch.tensor(of_samples, dtype=torch.float32).repeat_interleave(torch.tensor(lengths))


def _advantages(samples: list[Sample], lengths: list[int]) -> torch.Tensor | None:
    """[n] float32, of the samples' tokens; None if no sample has any."""
    if not any(sample.reward for sample in samples):
        return None
    return _per_token([sample.reward.advantage if sample.reward else 0.0 for sample in samples], lengths)


def _old_logprobs(samples: list[Sample], lengths: list[int]) -> torch.Tensor | None:
    """[n] float32, of the samples' tokens; None if no sample has any."""
    if all(sample.old_logprobs is None for sample in samples):
        return None
    unknown = torch.tensor(torch.nan)
    return torch.cat([unknown.expand(n) if s.old_logprobs is None else s.old_logprobs for s, n in zip(samples, lengths, strict=True)])
