"""A teacher behind HTTP: ``swift deploy --infer_backend vllm``, or any vLLM server with the OpenAI-compatible API.

A :class:`Question` is one row as the teacher sees it, in token ids. :class:`TeacherServer` asks one server, with retries; it says what
the k largest log-probabilities are at the trained positions, or lets the teacher answer. Whatever comes back is checked against the
ids that were sent, so that a server with another tokenizer or template, or a reply that was cut, never reaches the loss.

===============  ==============================================  ==================================================================
protocol         scores                                          answers
===============  ==============================================  ==================================================================
vLLM             ``POST /v1/completions``, ``prompt_logprobs``;  ``POST /v1/completions`` with ``logprobs``: ids and their k largest
                 with media ``POST /inference/v1/generate``      raw log-probabilities in one reply
                 (vLLM 0.32, ``--enable-scale-out``)
swift deploy     ``POST /infer/``, ``prompt_logprobs``           ``POST /infer/``; a scoring request follows
===============  ==============================================  ==================================================================
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import mimetypes
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np
import requests
from swift.utils import get_logger

from ..arguments import OptionError
from ..responses import Response, SamplingOptions

logger = get_logger()

KEY_VARIABLE = 'GKD_TEACHER_API_KEY'
PROBE = 'The 3 quick brown foxes jump: x = 0.5; café 狐狸\n'  # words, digits, signs, other scripts
MEDIA = {'images': 'image/png', 'videos': 'video/mp4', 'audios': 'audio/wav'}  # columns, and the type of what has no file name
CONNECT_SECONDS = 10
LONGEST_PAUSE = 30.0
MAX_INVALID_REPLIES = 3  # a proxy may cut a reply once; a server that keeps saying nonsense will not stop
# Set where it is known that a server will not come back: what fails is not tried again.
for_good = threading.Event()


class TeacherServerError(RuntimeError):
    """A server that gave no usable answer. The message is one line: server, step, reason, and what was tried."""


class _Retry(Exception):
    """A failure that may pass: no connection, a timeout, HTTP 5xx."""


class _Invalid(_Retry):
    """A reply that came, and can't be used."""


class _Final(Exception):
    """A failure that asking again can't mend."""


@dataclass(frozen=True)
class ServerOptions:
    """Attributes:
    topk: Log-probabilities per token; 0 for that of the token itself.
    timeout: Seconds for one request.
    retry_seconds: How long failures that may pass are retried.
    in_flight: Requests of this process at a time, per server.
    """

    topk: int
    timeout: float
    retry_seconds: float
    in_flight: int


@dataclass(frozen=True)
class Question:
    """A row, as the teacher sees it.

    Attributes:
        ids: Prompt and response, or the prompt alone; every media token is there (expanded).
        positions: [n] increasing, those of the trained tokens in ``ids``.
        compact_ids: ``ids`` with one placeholder for each medium, which is what vLLM expands itself.
        request: The row as a request of ms-swift (``RolloutInferRequest``), its last response as token ids.
        tag: Which of several servers it belongs to.
    """

    ids: list[int] = field(repr=False)
    positions: list[int] = field(repr=False)
    compact_ids: list[int] = field(repr=False)
    request: dict[str, Any] = field(repr=False)
    tag: str | None = None

    @property
    def has_media(self) -> bool:
        return any(self.request.get(kind) for kind in MEDIA)


@dataclass(frozen=True)
class Scores:
    """The k largest log-probabilities for n tokens.

    Attributes:
        logprobs: [n, k] float32, natural logarithm, at temperature 1, over the teacher's whole vocabulary; NaN if nobody was asked.
        ids: [n, k] int64.
    """

    logprobs: np.ndarray
    ids: np.ndarray

    @classmethod
    def empty(cls, n: int, k: int) -> Scores:
        return cls(np.full((n, k), -np.inf, np.float32), np.zeros((n, k), np.int64))

    @classmethod
    def unknown(cls, n: int, k: int) -> Scores:
        return cls(np.full((n, k), np.nan, np.float32), np.zeros((n, k), np.int64))

    def put(self, row: int, ids: Iterable[int], logprobs: Iterable[float]) -> None:
        """The k largest of at least k entries; a server adds the token that is there if it is not among them."""
        k = self.logprobs.shape[1]
        ids, logprobs = np.fromiter(ids, np.int64), np.fromiter(logprobs, np.float32)
        if len(ids) < k:
            raise _Invalid(f'token {row} has {len(ids)} log-probabilities, {k} were asked for')
        if not (logprobs <= 1e-3).all():  # also false for NaN; fp32 rounding may put log 1 a little above 0
            raise _Invalid(f'token {row} has a log-probability that is NaN or above 0')
        best = np.argsort(-logprobs, kind='stable')[:k]
        self.logprobs[row], self.ids[row] = np.minimum(logprobs[best], 0), ids[best]


# -- what replies look like. Fields that are not named here are skipped without an object being made of them: a reply to 2048 tokens with 64
# -- log-probabilities each has 11 MB of JSON, most of it ranks and decoded tokens.


class _Logprob(msgspec.Struct):
    logprob: float


# Entry p is for the token at position p, given those before it; the first is None.
_PromptLogprobs = list[dict[int, _Logprob] | None]


class _TopLogprobs(msgspec.Struct):
    top_logprobs: list[dict[str, float]]  # 'token_id:5'


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    prompt_logprobs: _PromptLogprobs | None = None
    logprobs: _TopLogprobs | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Infer(msgspec.Struct):
    choices: list[_Choice]
    prompt_logprobs: _PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class _Candidate(msgspec.Struct):
    token_id: int
    logprob: float


class _Candidates(msgspec.Struct):
    top_logprobs: list[_Candidate]


class _Content(msgspec.Struct):
    content: list[_Candidates]


class _GeneratedChoice(msgspec.Struct):
    token_ids: list[int] = []
    finish_reason: str | None = None
    logprobs: _Content | None = None


class _Generated(msgspec.Struct):
    choices: list[_GeneratedChoice]
    prompt_logprobs: _PromptLogprobs | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model] = []


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Version(msgspec.Struct):
    version: str


class _Schemas(msgspec.Struct):
    schemas: dict[str, dict[str, Any]]


class _OpenAPI(msgspec.Struct):
    components: _Schemas


T = TypeVar('T')


def _read(form: type[T], reply: bytes) -> T:
    try:
        return msgspec.json.decode(reply, type=form)
    except msgspec.ValidationError as error:
        raise _Invalid(f'a reply of another form ({error})') from None
    except msgspec.DecodeError:
        raise _Invalid('a reply with NaN in it' if b'NaN' in reply else 'a reply that is no JSON') from None


def _scores_of_prompt(entries: _PromptLogprobs | None, question: Question, k: int) -> Scores:
    if entries is None:
        raise _Invalid('it has no prompt_logprobs')
    ids = question.ids
    if len(entries) > len(ids):
        raise _Final(
            f'it sees {len(entries)} tokens where {len(ids)} were meant; teacher and student must share tokenizer, template and image sizes'
        )
    for position in range(1, len(entries)):
        entry = entries[position]
        if entry is None:
            raise _Invalid(f'position {position} of {len(ids)} has no log-probabilities')
        if ids[position] not in entry:
            raise _Final(
                f'it has other tokens than {ids[position]} at position {position} of {len(ids)}: another tokenizer or another template'
            )
    if len(entries) < len(ids):
        raise _Invalid(f'it has {len(entries)} of {len(ids)} positions')
    scores = Scores.empty(len(question.positions), max(k, 1))
    for row, position in enumerate(question.positions):
        entry = entries[position] if k else {ids[position]: entries[position][ids[position]]}
        scores.put(row, entry, (e.logprob for e in entry.values()))
    return scores


class _VLLM:
    """The OpenAI-compatible API of vLLM, with token ids."""

    name = 'vLLM'

    def __init__(self, model: str):
        self.model = model

    def score(self, question: Question, k: int) -> tuple[str, dict[str, Any], Callable[[bytes], Scores]]:
        if question.has_media:
            sampling = {'max_tokens': 1, 'temperature': 0.0, 'prompt_logprobs': max(k, 1), 'detokenize': False}
            payload = {**self._with_media(question), 'sampling_params': sampling}
            return '/inference/v1/generate', payload, lambda reply: _scores_of_prompt(_read(_Generated, reply).prompt_logprobs, question, k)
        payload = {'model': self.model, 'prompt': question.ids, 'max_tokens': 1, 'temperature': 0.0, 'prompt_logprobs': max(k, 1)}
        return '/v1/completions', payload, lambda reply: _scores_of_prompt(_only(_read(_Completion, reply)).prompt_logprobs, question, k)

    def check(self, request: Callable[..., bytes], ids: list[int], k: int, media: bool) -> None:
        """PROBE in the server's own tokens, k log-probabilities of ours, and media beside token ids if there will be any."""
        reply = request('POST', '/tokenize', {'model': self.model, 'prompt': PROBE, 'add_special_tokens': False})
        _same_tokens(ids, _read(_Tokens, reply).tokens)
        path, payload, parse = self.score(Question(ids, [len(ids) - 1], ids, {}), k)
        parse(request('POST', path, payload))
        if media:
            forms = _read(_OpenAPI, request('GET', '/openapi.json')).components.schemas
            if 'content_parts' not in forms.get('GenerateRequest', {}).get('properties', {}):
                version = _read(_Version, request('GET', '/version')).version
                raise _Final(
                    f'the dataset has images, videos or audio, which this vLLM {version} does not take beside token ids; start a vLLM 0.32 '
                    'with --enable-scale-out, or use swift deploy'
                )

    def answer(self, question: Question, options: SamplingOptions, seed: int, stop_ids: Sequence[int], k: int):
        sampling = {
            'max_tokens': options.max_tokens,
            'temperature': options.temperature,
            'top_p': options.top_p,
            'top_k': max(options.top_k, 0),
            'min_p': options.min_p,
            'repetition_penalty': options.repetition_penalty,
            'stop': list(options.stop_words),
            'stop_token_ids': list(stop_ids),
            'seed': seed % 2**31,
            'logprobs': k or None,
        }
        if question.has_media:
            return '/inference/v1/generate', {**self._with_media(question), 'sampling_params': sampling}, self._parse_generated(k)
        payload = {
            'model': self.model,
            'prompt': question.ids,
            'return_token_ids': True,
            'return_tokens_as_token_ids': True,
            **sampling,
        }
        return '/v1/completions', payload, self._parse_completion(k)

    def _with_media(self, question: Question) -> dict[str, Any]:
        parts = []
        for kind in MEDIA:
            for url in question.request.get(kind) or ():
                if not isinstance(url, str):
                    raise _Final(f'vLLM takes no lists of {kind}, as in row {question.request["uuid"]}; use swift deploy')
                parts.append({'type': f'{kind[:-1]}_url', 'url': url})
        return {'model': self.model, 'token_ids': question.compact_ids, 'content_parts': parts}

    @staticmethod
    def _parse_completion(k: int) -> Callable[[bytes], tuple[Response, Scores | None]]:
        def parse(reply: bytes) -> tuple[Response, Scores | None]:
            choice = _only(_read(_Completion, reply))
            if choice.token_ids is None:
                raise _Final('it returns no token ids; a vLLM that knows return_token_ids (0.10.2 or later) is needed')
            tops = choice.logprobs.top_logprobs if choice.logprobs else []
            named = (((int(name.removeprefix('token_id:')) for name in top), top.values()) for top in tops)
            return _answered(choice, choice.token_ids, list(named), k)

        return parse

    @staticmethod
    def _parse_generated(k: int) -> Callable[[bytes], tuple[Response, Scores | None]]:
        def parse(reply: bytes) -> tuple[Response, Scores | None]:
            choice = _only(_read(_Generated, reply))
            tops = [one.top_logprobs for one in choice.logprobs.content] if choice.logprobs else []
            return _answered(choice, choice.token_ids, [([c.token_id for c in top], [c.logprob for c in top]) for top in tops], k)

        return parse


def _answered(choice: Any, ids: list[int], tops: list[tuple[Iterable[int], Iterable[float]]], k: int) -> tuple[Response, Scores | None]:
    """A response and, for k > 0, its scores from the ids and log-probabilities at each of its tokens."""
    response = Response(ids, choice.finish_reason or 'stop')
    if not k:
        return response, None
    if len(tops) != len(ids):
        raise _Invalid(f'{len(ids)} tokens with {len(tops)} rows of log-probabilities')
    scores = Scores.empty(len(ids), k)
    for row, (top_ids, logprobs) in enumerate(tops):
        scores.put(row, top_ids, logprobs)
    return response, scores


class _SwiftDeploy:
    """The ``/infer/`` endpoint of ``swift deploy``: messages in, of which the response is token ids."""

    name = 'swift deploy'

    def score(self, question: Question, k: int) -> tuple[str, dict[str, Any], Callable[[bytes], Scores]]:
        config = {'prompt_logprobs': max(k, 1), 'max_tokens': 1, 'temperature': 0.0}
        return '/infer/', _infer(question, config), lambda reply: _scores_of_prompt(_first(reply).prompt_logprobs, question, k)

    def check(self, request: Callable[..., bytes], ids: list[int], k: int, media: bool) -> None:
        """PROBE as a message, in the server's own tokens, and k log-probabilities of each."""
        question = Question([], [], [], {'messages': [{'role': 'user', 'content': PROBE}]})
        config = {'prompt_logprobs': max(k, 1), 'max_tokens': 1, 'temperature': 0.0, 'return_details': True}
        reply = _first(request('POST', '/infer/', _infer(question, config)))
        theirs, entries = reply.prompt_token_ids or [], reply.prompt_logprobs
        at = next((i for i in range(len(theirs)) if theirs[i : i + len(ids) - 1] == ids[:-1]), None)
        _same_tokens(ids, theirs if at is None else ids)  # the last id may be one with what the template puts after it
        if not entries or entries[-1] is None or len(entries[-1]) < k:
            raise _Invalid(f'it sends {len((entries or [{}])[-1] or {})} log-probabilities per token, {k} were asked for')

    def answer(self, question: Question, options: SamplingOptions, seed: int, stop_ids: Sequence[int], k: int):
        config = {
            'max_tokens': options.max_tokens,
            'temperature': options.temperature,
            'top_p': options.top_p,
            'top_k': options.top_k if options.top_k > 0 else -1,
            'min_p': options.min_p,
            'repetition_penalty': options.repetition_penalty,
            'stop': list(options.stop_words),
            'seed': seed % 2**31,
            'return_details': True,
        }
        return '/infer/', _infer(question, config), self._parse

    @staticmethod
    def _parse(reply: bytes) -> tuple[Response, Scores | None]:
        choice = _only(_first(reply))
        if choice.token_ids is None:
            raise _Final('it returns no token ids; the teacher needs swift deploy --infer_backend vllm')
        return Response(choice.token_ids, choice.finish_reason or 'stop'), None


def _same_tokens(ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        raise _Final(f'it turns {PROBE!r} into the ids {theirs[:12]}…, the student into {ours[:12]}…: the tokenizers differ')


def _infer(question: Question, config: dict[str, Any]) -> dict[str, Any]:
    return {'infer_requests': [question.request], 'request_config': config}


def _first(reply: bytes) -> _Infer:
    replies = _read(list[_Infer], reply)
    if len(replies) != 1:
        raise _Invalid(f'1 reply was expected, not {len(replies)}')
    return replies[0]


def _only(reply: Any) -> Any:
    if len(reply.choices) != 1:
        raise _Invalid(f'1 choice was expected, not {len(reply.choices)}')
    return reply.choices[0]


class TeacherServer:
    """One server.

    Args:
        url: ``http://host:port`` or ``http://host:port/path``, with or without a final ``/v1``.
        options: How it is asked.
        number: Which of several teachers it serves, from 0.
        tags: The rows it is asked for; empty for all.
        step: Tells the optimizer step, for messages.

    Raises:
        OptionError: The URL has no host, or has a user name or password in it.
    """

    def __init__(
        self, url: str, options: ServerOptions, number: int = 0, tags: Sequence[str] = (), step: Callable[[], str] = lambda: 'start-up'
    ):
        parts = urlsplit(url if '//' in url else f'http://{url}')
        if parts.username or parts.password:
            raise OptionError(
                f'--teacher_model_server: the URL of {parts.hostname} has a user name or password in it, which would end up in logs and '
                f'args.json; put a key into the environment variable {KEY_VARIABLE}.'
            )
        if parts.scheme not in ('http', 'https') or not parts.hostname:
            raise OptionError(f'--teacher_model_server {url}: not a URL like http://127.0.0.1:8000.')
        self.url = f'{parts.scheme}://{parts.netloc}{parts.path}'.rstrip('/').removesuffix('/v1')
        self.options, self.tags, self.step = options, tuple(tags), step
        key = os.environ.get(f'{KEY_VARIABLE}_{number}') or os.environ.get(KEY_VARIABLE)
        self._session = requests.Session()
        self._session.mount('http://', requests.adapters.HTTPAdapter(pool_maxsize=options.in_flight))
        self._session.mount('https://', requests.adapters.HTTPAdapter(pool_maxsize=options.in_flight))
        if key:
            self._session.headers['Authorization'] = f'Bearer {key}'
        self.protocol: _VLLM | _SwiftDeploy | None = None
        self.stopped = threading.Event()

    # -- HTTP ------------------------------------------------------------------------------------------------------------------

    def _request(self, method: str, path: str, payload: Any = None) -> bytes:
        try:
            reply = self._session.request(method, self.url + path, json=payload, timeout=(CONNECT_SECONDS, self.options.timeout))
            status, text = reply.status_code, reply.text[:300] if reply.status_code != 200 else ''
            if status in (404, 405):
                raise _Final(f'HTTP {status} for {path}')
            if status == 429 or status >= 500:
                raise _Retry(f'HTTP {status} {" ".join(text.split())}'.rstrip())
            if status != 200:
                key = (
                    f' (the key is taken from the environment variable {KEY_VARIABLE})' if status in (401, 403) or 'API key' in text else ''
                )
                raise _Final(f'HTTP {status} {" ".join(text.split())}'.rstrip() + key)
            return reply.content
        except requests.exceptions.Timeout:
            raise _Retry(f'no answer within {self.options.timeout:g} s') from None
        except requests.exceptions.RequestException as error:
            raise _Retry(f'no connection ({type(error).__name__}: {_cause(error)})') from None

    def _ask(self, method: str, path: str, payload: Any, parse: Callable[[bytes], Any], retry_seconds: float | None = None) -> Any:
        """Ask until there is a usable answer or no hope.

        Raises:
            TeacherServerError: With the reason.
        """
        window = self.options.retry_seconds if retry_seconds is None else retry_seconds
        failed_since, tries, invalid, pause = None, 0, 0, 1.0
        while True:
            tries += 1
            try:
                found = parse(self._request(method, path, payload))
            except _Final as problem:
                raise self._error(problem) from None
            except _Retry as problem:
                now = time.monotonic()
                failed_since = failed_since or now
                invalid += isinstance(problem, _Invalid)
                waited = now - failed_since
                if for_good.is_set() or waited + pause > window or invalid >= MAX_INVALID_REPLIES:
                    gone = f'; given up after {tries} tries in {waited:.0f} s' if window else ''
                    raise self._error(f'{problem}{gone}') from None
                logger.warning(
                    f'Teacher server {self.url}, step {self.step()}: {problem}; next try in {pause:g} s ({waited:.0f} of {window:g} s).'
                )
                if self.stopped.wait(pause):
                    raise self._error(f'{problem}; the run ends') from None
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if failed_since is not None:
                    logger.info(f'Teacher server {self.url} is back after {time.monotonic() - failed_since:.0f} s.')
                return found

    def _again(self, method: str, path: str, payload: Any = None) -> bytes:
        """For questions whose failure says something: a kept connection that the server has just closed says nothing."""
        return self._ask(method, path, payload, lambda reply: reply, retry_seconds=2)

    def _error(self, problem: object) -> TeacherServerError:
        return TeacherServerError(f'Teacher server {self.url}, step {self.step()}: {problem}.')

    # -- questions -----------------------------------------------------------------------------------------------------------------

    def connect(self, retry_seconds: float = 0) -> None:
        """Find out which protocol the server speaks.

        Raises:
            TeacherServerError: It can't be reached, or speaks neither.
        """
        models = self._ask('GET', '/v1/models', None, lambda reply: [m.id for m in _read(_Models, reply).data], retry_seconds)
        try:
            self._again('POST', '/infer/', {'infer_requests': []})
            self.protocol = _SwiftDeploy()
        except TeacherServerError:
            if not models:
                raise self._error('it lists no model') from None
            self.protocol = _VLLM(models[0])
        logger.info(f'Teacher server {self.url}: {self.protocol.name}, model {", ".join(models)}.')

    def score(self, question: Question) -> Scores:
        """The k largest log-probabilities at the question's positions; no request is made if it has none."""
        if not question.positions:
            return Scores.empty(0, max(self.options.topk, 1))
        path, payload, parse = self.protocol.score(question, self.options.topk)
        return self._ask('POST', path, payload, parse)

    def answer(self, question: Question, options: SamplingOptions, seed: int, stop_ids: Sequence[int]) -> tuple[Response, Scores | None]:
        """A response of the teacher to a prompt; with its scores where the server sends them."""
        path, payload, parse = self.protocol.answer(question, options, seed, stop_ids, self.options.topk)
        return self._ask('POST', path, payload, parse)

    def check(self, tokenizer: Any, media: bool = False) -> None:
        """Ask one short question, for a clear word before any weights load.

        Args:
            tokenizer: The student's.
            media: There are rows with images, videos or audio.

        Raises:
            OptionError: The server allows fewer log-probabilities.
            TeacherServerError: Another tokenizer, or anything else.
        """
        try:
            self.protocol.check(self._request, tokenizer.encode(PROBE, add_special_tokens=False), self.options.topk, media)
        except (_Retry, _Final) as problem:
            if self._sends_one(tokenizer, media):
                raise OptionError(
                    f'--gkd_logits_topk {self.options.topk}: teacher server {self.url} sends fewer ({problem}); start it with '
                    f'--max-logprobs {self.options.topk} (swift deploy: --max_logprobs {self.options.topk}), or choose fewer.'
                ) from None
            raise self._error(problem) from None

    def _sends_one(self, tokenizer: Any, media: bool) -> bool:
        """Whether it is only the number of log-probabilities that a server minds: swift deploy says no more than HTTP 500."""
        try:
            self.protocol.check(self._again, tokenizer.encode(PROBE, add_special_tokens=False), 1, media)
        except (_Retry, _Final, TeacherServerError):
            return False
        return True


def _cause(error: BaseException) -> str:
    """The innermost reason of a connection error, without the object's address."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error)[:120] or type(error).__name__


class TeacherServers:
    """All servers of ``--teacher_model_server``, asked with several requests in flight.

    Args:
        value: One address, or a JSON list of ``{"url": …, "tags": […]}`` as in ms-swift. An address may be several with commas between
            them: replicas of one teacher, of which each question goes to the one with the fewest under way.
        options: How they are asked.
        step: Tells the optimizer step, for messages.

    Attributes:
        servers: All of them.
        teachers: The tags of each teacher; one, without any, that all rows are for, or several.
    """

    def __init__(self, value: str, options: ServerOptions, step: Callable[[], str] = lambda: 'start-up'):
        from swift.rlhf_trainers.gkd_helpers import parse_teacher_model_server

        found = parse_teacher_model_server(value)
        self.teachers = [tuple(one.tags) for one in found]
        self.servers = [
            TeacherServer(url.strip(), options, number, one.tags, step) for number, one in enumerate(found) for url in one.url.split(',')
        ]
        self._pool = ThreadPoolExecutor(options.in_flight * len(self.servers), thread_name_prefix='teacher-server')
        self._under_way: Counter[str] = Counter()  # requests, by address
        self._lock = threading.Lock()

    def replicas_for(self, question: Question) -> list[TeacherServer]:
        """The servers of the teacher that the question is for.

        Raises:
            TeacherServerError: There is none.
        """
        if len(self.teachers) == 1:
            return self.servers
        replicas = [server for server in self.servers if question.tag in server.tags]
        if not replicas:
            tags = ', '.join(itertools.chain.from_iterable(self.teachers))
            raise TeacherServerError(f'A row has the tag {question.tag!r}, and the servers of --teacher_model_server have {tags}.')
        return replicas

    def connect(self, retry_seconds: float = 0) -> None:
        for server in self.servers:
            server.connect(retry_seconds)

    @property
    def sends_scores_with_answers(self) -> bool:
        return all(isinstance(server.protocol, _VLLM) for server in self.servers)

    def begin(self, ask: Callable[[TeacherServer, Any], Any], question: Question, argument: Any) -> Future:
        """``ask(server, argument)`` in a thread; a question that no server is for fails there too."""
        return self._pool.submit(self._ask, ask, question, argument)

    def _ask(self, ask: Callable[[TeacherServer, Any], Any], question: Question, argument: Any) -> Any:
        with self._lock:
            server = min(self.replicas_for(question), key=lambda replica: self._under_way[replica.url])
            self._under_way[server.url] += 1
        try:
            return ask(server, argument)
        finally:
            with self._lock:
                self._under_way[server.url] -= 1

    def stop(self) -> None:
        """Ask nothing more. What is under way fails instead of being tried again: threads that wait for a server would keep a run from
        its end."""
        for server in self.servers:
            server.stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def each(self, ask: Callable[[TeacherServer, Any], Any], questions: Sequence[tuple[Question, Any]]) -> list[Any]:
        """``ask(server, argument)`` for each (question, argument), in order of the questions.

        Raises:
            TeacherServerError: The first one, after all requests have ended.
        """
        futures = [self.begin(ask, question, argument) for question, argument in questions]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]


def as_request(request: Any) -> dict[str, Any]:
    """A request of ms-swift as JSON. Files travel with it, for the server may be elsewhere."""
    content = dataclasses.asdict(request)
    return {**content, **{kind: [_portable(medium, mime) for medium in content.get(kind) or ()] for kind, mime in MEDIA.items()}}


def _portable(medium: Any, mime: str) -> Any:
    """A path, URL or base64 text as a URL that any host can open; a list of frames one by one."""
    if isinstance(medium, list):
        return [_portable(frame, MEDIA['images']) for frame in medium]
    if medium.startswith(('http://', 'https://', 'data:')):
        return medium
    path = medium.removeprefix('file://')
    if os.path.isfile(path):
        mime = mimetypes.guess_type(path)[0] or mime
        with open(path, 'rb') as file:
            medium = base64.b64encode(file.read()).decode()
    return f'data:{mime};base64,{medium}'
