"""Responses by megatron-core: student and teacher answer in the training processes, on whatever layout they have.

One token of all responses on their way is one pass of the pipeline schedule, with megatron-core's static KV cache. Prompts of similar
length share a micro-batch whose rows are at the same position at all times: it starts with as many tokens as its shortest prompt has, and
takes the longer ones' next tokens from their prompts. So nothing is padded, and attention needs no mask. A prompt with images, videos or
audio is a micro-batch of its own, which the towers see with its first pass.

A micro-batch sets out when there is room for its keys and values beside those of the others, and makes room when its last row has ended.

All prompts of all ranks are shared out over the model's replicas, context-parallel ranks included, which are replicas here: attention
over the cache is not split along the sequence. Neither is sequence parallelism used, for one token cannot be split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mcore_bridge.model import GPTModel, MultimodalGPTModel
from megatron.core import mpu
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.attention import Attention
from swift.utils import get_current_device, to_device
from torch import nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList, SuppressTokensLogitsProcessor

from ..arguments import OptionError
from ..responses import Prompt, Response, SamplingOptions
from ..responses.budget import PASS_TOKENS, default_tokens
from ..responses.local import ends_of_responses, evaluation_mode, inference_template, never_sampled, unpacked
from ..responses.sampling import sampling_processors
from ..teachers.server import MEDIA
from ..world import exchange_objects, from_all
from .exchange import numbers_of_all

# Rows share a micro-batch if their prompts differ by no more tokens than this: each of them is a pass for the whole batch.
SPREAD = 64
# What a collator makes beside the inputs of the towers.
OF_TEXT = ('input_ids', 'labels', 'loss_scale', 'attention_mask', 'attention_mask_2d', 'position_ids', 'text_position_ids', 'seq_lens')
# Where modules of megatron-core and Transformer Engine keep whether the sequence is split over the tensor-parallel ranks.
SEQUENCE_PARALLEL = ('sequence_parallel', 'scatter_to_sequence_parallel', 'reduce_scatter_embeddings')


@dataclass
class _Row:
    """A prompt and what was sampled for it so far.

    Attributes:
        number: Its place among all prompts.
        prompt, answer: Token ids.
        media: Keyword arguments of the model for the images, videos and audio of the prompt.
        positions: [3, 1, tokens] of the prompt where they are not 0, 1, 2, ...
        warp: Turns the scores [1, vocab] of the next token into those whose largest is taken.
        ended: Whether ids [1, n] end with what ends a response.
    """

    number: int
    prompt: list[int]
    warp: LogitsProcessorList
    ended: StoppingCriteriaList
    media: dict[str, Any] = field(default_factory=dict)
    positions: torch.Tensor | None = None
    answer: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class _Batch:
    """Rows that are at the same position, and their KV cache.

    Args:
        rows: At least one; a row with media is alone.
        max_tokens: Of a response.
        cached: Whether the model keeps keys and values; otherwise each pass begins at the first token.
    """

    def __init__(self, rows: list[_Row], max_tokens: int, cached: bool):
        self.rows, self.max_tokens = rows, max_tokens
        self.length = min(len(row.prompt) for row in rows)  # tokens of each row so far
        longest = max(len(row.prompt) for row in rows) + max_tokens
        self.ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for ids, row in zip(self.ids, rows, strict=True):
            ids[: self.length] = torch.tensor(row.prompt[: self.length])
        self.cache = StaticInferenceContext(len(rows), longest) if cached else None

    @property
    def tokens(self) -> int:
        """What there is room for, from the first pass to the last."""
        return self.ids.numel()

    @property
    def running(self) -> bool:
        return any(row.finish_reason is None for row in self.rows)

    @property
    def shows_media(self) -> bool:
        """Whether the next pass goes through the towers. With a cache only the first one does."""
        return bool(self.rows[0].media) and (self.cache is None or self.cache.sequence_len_offset == 0)

    def inputs(self, device: torch.device, mrope: bool) -> dict[str, Any]:
        """Keyword arguments of the model for the tokens that it has not seen."""
        first = self.cache.sequence_len_offset if self.cache is not None else 0
        ids = self.ids[:, first : self.length].to(device)
        # Attention takes the rotary embeddings of the new tokens out of those of all tokens, which mrope makes of these positions.
        positions = self._positions().to(device) if mrope else torch.arange(first, self.length, device=device).expand_as(ids)
        media = to_device(self.rows[0].media, device) if self.shows_media else {}
        return {'input_ids': ids, 'position_ids': positions, 'attention_mask': None, 'inference_context': self.cache, **media}

    def _positions(self) -> torch.Tensor:
        """[3, rows, tokens] of all tokens so far: a response goes on behind the last position of its prompt."""
        given = self.rows[0].positions
        if given is None:
            return torch.arange(self.length).expand(3, len(self.rows), -1)
        behind = given.max() + 1 + torch.arange(self.length - given.shape[-1])
        return torch.cat([given, behind.expand(3, 1, -1)], -1)

    def sampled(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] -> [rows] next tokens; those of rows that do not sample are 0."""
        tokens = torch.zeros(len(self.rows), dtype=torch.int64, device=logits.device)
        for number, row in enumerate(self.rows):
            if row.finish_reason is None and self.length >= len(row.prompt):
                ids = self.ids[number : number + 1, : self.length].to(logits.device)
                tokens[number] = row.warp(ids, logits[number : number + 1].float()).argmax()
        return tokens

    def advance(self, tokens: list[int]) -> None:
        """Append one token to each row: the prompt's own, as long as it has one."""
        if self.cache is not None:
            self.cache.sequence_len_offset = self.length
        for number, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if self.length < len(row.prompt):
                token = row.prompt[self.length]
            self.ids[number, self.length] = token
            if self.length < len(row.prompt) or row.finish_reason is not None:
                continue
            row.answer.append(token)
            if row.ended(self.ids[number : number + 1, : self.length + 1], None).item():
                row.finish_reason = 'stop'
            elif len(row.answer) == self.max_tokens:
                row.finish_reason = 'length'
        self.length += 1


class Generator:
    """Generates with one model of the training processes.

    Args:
        template: ms-swift's template of the student, used for encoding and stop words.
        lend_model: Gives the model's chunks, in the layout in which they run.
        eos: Ids that end a response.
        tokens: Prompt and longest possible response, summed over the rows of a replica that are on their way together; None for what
            :func:`default_tokens` makes of the model.
    """

    def __init__(
        self, template, lend_model: Callable[[], AbstractContextManager[list[nn.Module]]], eos: list[int], tokens: int | None = None
    ):
        self.template, self.lend_model, self.eos, self.tokens = template, lend_model, eos, tokens

    def __call__(self, prompts: list[Prompt], seeds: list[int], options: SamplingOptions) -> list[Response]:
        """Answer each prompt. Every rank calls it, with none as well; ranks with the same rows give the same prompts.

        Args:
            prompts: Other replicas are sent their ``inputs``, which are smaller than what images are encoded to.
            seeds: One per prompt; what a prompt is answered depends on no other prompt.
        """
        owners = mpu.get_data_parallel_group()  # each of its ranks has other rows, and together they have all
        mine = dist.get_rank(owners)
        # (data-parallel rank, number there) of all prompts, in an order that all ranks know.
        counts = numbers_of_all(len(prompts), owners)
        everything = [(owner, number) for owner, count in enumerate(counts) for number in range(count)]
        if not everything:
            return []
        with self.lend_model() as chunks:
            # In the layout of the model that answers, which need not be that of the student.
            replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
            shares = [
                range(replica, len(everything), replicas)
                for replica in numbers_of_all(mpu.get_data_parallel_rank(with_context_parallel=True), owners)
            ]
            wanted = [[everything[n][1] for n in share if everything[n][0] == mine] for share in shares]
            outgoing = [{number: (prompts[number].inputs, seeds[number]) for number in of} for of in wanted]
            asked = exchange_objects(outgoing, get_current_device(), owners)
            rows = []
            for n in shares[mine]:
                owner, number = everything[n]
                inputs, seed = asked[owner][number]
                prompt = prompts[number] if owner == mine else Prompt(inputs, self._encoded(inputs))
                rows.append(self._row(n, prompt, seed, options))
            _generate(chunks, rows, options.max_tokens, self.tokens)
            answers = [(row.number, row.answer, row.finish_reason) for row in rows] if _first_of_replica() else []
        found = {everything[number]: Response(ids, reason) for part in from_all(answers) for number, ids, reason in part}
        return [found[mine, number] for number in range(len(prompts))]

    def _encoded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        with inference_template(self.template) as template:
            return template.encode(inputs)

    def _row(self, number: int, prompt: Prompt, seed: int, options: SamplingOptions) -> _Row:
        template = self.template
        ids, media, positions = prompt.encoded['input_ids'], {}, None
        if template.model_meta.is_multimodal and any(prompt.inputs.get(kind) for kind in MEDIA):
            with unpacked(template):
                media = template.data_collator([dict(prompt.encoded)], padding_to=None)  # it takes the row apart
            positions = media.get('position_ids')
            media = {name: value for name, value in media.items() if name not in OF_TEXT}
        warp = LogitsProcessorList()
        suppressed = never_sampled(self.template)
        if suppressed:
            warp.append(SuppressTokensLogitsProcessor(suppressed, get_current_device()))
        if options.repetition_penalty != 1:
            warp.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
        warp.extend(sampling_processors(options, [seed], torch.device(get_current_device())))
        return _Row(number, ids, warp, ends_of_responses(template, self.eos, options), media, positions)


def _first_of_replica() -> bool:
    return mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_pipeline_model_parallel_rank() == 0


def _generate(chunks: list[nn.Module], rows: list[_Row], max_tokens: int, budget: int | None) -> None:
    """Answer the rows of this replica. All replicas call it; those that share experts run each other's number of passes."""
    config = chunks[0].config
    models = list(map(_language_model, chunks))
    cached = all(map(keeps_cache, models))
    lockstep = bool(config.num_moe_experts) and mpu.get_expert_tensor_and_model_parallel_world_size() > 1
    device = torch.device(get_current_device())
    budget = budget or default_tokens(_bytes_per_token(models, device) if cached else None)
    waiting = deque(_Batch(part, max_tokens, cached) for part in _of_similar_length(rows, max_tokens, budget, cached))
    running: list[_Batch] = []
    stages = mpu.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1
    with _inference(chunks, models) as see:
        while True:
            running = [batch for batch in running if batch.running]  # the others' caches go
            while waiting and (not running or sum(batch.tokens for batch in running) + waiting[0].tokens <= budget):
                running.append(waiting.popleft())
            count = torch.tensor(len(running), device=device)
            if lockstep:
                dist.all_reduce(count, op=dist.ReduceOp.MAX)
            if not count:
                return
            # The interleaved schedule wants a multiple of the stages.
            idle = -(-count.item() // stages) * stages - len(running)
            logits = _pass(chunks, running + [_Batch([_Row(-1, [0], None, None)], 1, cached) for _ in range(idle)], see, device)
            tokens = torch.zeros(sum(len(batch.rows) for batch in running), dtype=torch.int64, device=device)
            if logits and running:
                tokens = torch.cat([batch.sampled(of_batch) for batch, of_batch in zip(running, logits, strict=False)])
            if running:
                _advance(running, _agreed(tokens).tolist())


def _advance(batches: list[_Batch], tokens: list[int]) -> None:
    for batch in batches:
        batch.advance(tokens[: len(batch.rows)])
        del tokens[: len(batch.rows)]


def _bytes_per_token(models: list[GPTModel], device: torch.device) -> int:
    """Of keys and values, on the rank of the pipeline that has the most layers: all of them need the same micro-batches."""
    total = 0
    for model in models:
        for attention in _attentions(model):
            width = attention.key_hidden_size + attention.val_hidden_size
            total += attention.num_query_groups_per_partition * width * model.config.params_dtype.itemsize
    most = torch.tensor(total, device=device)
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mpu.get_pipeline_model_parallel_group())
    return most.item()


def _language_model(chunk: nn.Module) -> GPTModel:
    return next(m for m in chunk.modules() if isinstance(m, GPTModel))


def _of_similar_length(rows: list[_Row], max_tokens: int, budget: int, cached: bool) -> list[list[_Row]]:
    """Rows with prompts of similar length: enough such parts to fill the pipeline, and none too large for its share of the budget or for
    a pass, which without a cache sees the responses too."""
    parts: list[list[_Row]] = []
    stages = mpu.get_pipeline_model_parallel_world_size()
    most = -(-len(rows) // stages)
    for row in sorted(rows, key=lambda row: (bool(row.media), len(row.prompt))):
        count, longest = (len(parts[-1]) + 1 if parts else 1), len(row.prompt)
        similar = parts and not row.media and longest - len(parts[-1][0].prompt) <= SPREAD
        fits = count * (longest + max_tokens) <= budget // stages and count * (longest if cached else longest + max_tokens) <= PASS_TOKENS
        if similar and count <= most and fits:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _pass(chunks: list[nn.Module], batches: list[_Batch], see: Callable[[int], None], device: torch.device) -> list[torch.Tensor]:
    """The logits [rows, vocab] of each batch's next token, on the ranks of the last stage."""

    def forward_step(data_iterator: Iterator[_Batch], chunk: nn.Module):
        batch = next(data_iterator)
        see(batch.length)
        model = _language_model(chunk)
        inputs = batch.inputs(device, model.position_embedding_type == 'mrope')
        output = (chunk if batch.shows_media else model)(**inputs, runtime_gather_output=True)
        return output, lambda logits, non_loss_data: logits[:, -1, : chunk.config.padded_vocab_size]

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=1,  # the bridge's models tell each other the shapes
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _agreed(tokens: torch.Tensor) -> torch.Tensor:
    """What the first rank of the last stage has sampled, on all ranks of the replica: sums over a sorted vocabulary need not come out
    the same on two GPUs."""
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(tokens, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
    if mpu.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(tokens, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group())
    return tokens


def _attentions(model: GPTModel) -> list[nn.Module]:
    return [layer.self_attention for layer in model.decoder.layers]


def keeps_cache(model: GPTModel) -> bool:
    """Whether megatron-core's static cache is right for all layers. It is for plain attention; what sees a window of the sequence or
    keeps a state of its own goes over the whole sequence for each token instead."""
    return model.config.window_size is None and all(
        type(attention).forward is Attention.forward and type(attention.core_attention) is TEDotProductAttention
        for attention in _attentions(model)
    )


def check_generates(chunks: list[nn.Module], side: str) -> None:
    """Raises:
    OptionError: The model cannot answer in the training processes.
    """
    config = chunks[0].config
    models = [m for chunk in chunks for m in chunk.modules() if isinstance(m, GPTModel)]
    # A multimodal model gathers what context-parallel ranks hold of a prompt, and here each of them holds all of it.
    whole = all(isinstance(attention, Attention) for model in models for attention in _attentions(model))
    multimodal = any(isinstance(m, MultimodalGPTModel) for chunk in chunks for m in chunk.modules())
    if not models or (config.context_parallel_size > 1 and (multimodal or not whole)):
        raise OptionError(
            f'{side}: {type(chunks[0]).__name__} with --context_parallel_size {config.context_parallel_size} cannot answer in the training '
            'processes; use --use_vllm true, or --context_parallel_size 1.'
        )


@contextmanager
def _inference(chunks: list[nn.Module], models: list[GPTModel]) -> Iterator[Callable[[int], None]]:
    """The model as it generates: whole sequences on each rank, positions counted from the first token.

    Yields:
        To be told, before each forward, how many tokens its rows have by its end.
    """
    length = 0

    def see(tokens: int) -> None:
        nonlocal length
        length = tokens

    def rotary(of_model: Callable, decoder_input, position_ids, packed_seq_params=None, inference_context=None):
        # The bridge would ask for as many positions as there are new tokens (mcore-bridge 1.6.5, gpt_model.py:187), and cut them for the
        # context-parallel ranks; for packed rows it takes their length as it is given.
        return of_model(decoder_input, position_ids, PackedSeqParams(qkv_format='thd', max_seqlen_q=length, max_seqlen_kv=length))

    def last_token(module: nn.Module, inputs: tuple) -> tuple:
        return inputs[0][-1:], *inputs[1:]

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for chunk in chunks:
            stack.enter_context(evaluation_mode(chunk))
            for module in chunk.modules():
                own = vars(module)
                for name in SEQUENCE_PARALLEL:
                    if own.get(name) is True:
                        _set(stack, module, name, False)
                if isinstance(module, TEDotProductAttention) and module.cp_group is not None:
                    _set(stack, module, 'cp_group', None)
                config = own.get('config')
                for name, value in (('sequence_parallel', False), ('context_parallel_size', 1)):
                    if config is not None and vars(config).get(name, value) != value:
                        _set(stack, config, name, value)
        for model in models:
            model._get_rotary_pos_emb = partial(rotary, model._get_rotary_pos_emb)
            stack.callback(delattr, model, '_get_rotary_pos_emb')
            if model.post_process:
                stack.callback(model.output_layer.register_forward_pre_hook(last_token).remove)
        yield see


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
