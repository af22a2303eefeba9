"""Responses by ``transformers``: batched, with a KV cache, from a model that may be in the middle of its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from .budget import bytes_per_token, default_tokens, waves
from .sampling import FinishedAt, Prompt, Response, SamplingOptions, sampling_processors


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, each in its own former mode after, whatever happens.

    ``model.train()`` afterwards would also wake frozen parts that ms-swift keeps in eval mode. Eval mode is needed for more than
    dropout: with gradient checkpointing on, transformers 5.19 decodes a model in train mode without its cache and generates wrong
    text, with only a warning.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unpacked(template) -> Iterator[None]:
    """The template collates rows, neither packed nor split over ranks."""
    before = template.padding_free, template.sequence_parallel_size
    template.padding_free, template.sequence_parallel_size = False, 1
    try:
        yield
    finally:
        template.padding_free, template.sequence_parallel_size = before


@contextmanager
def inference_template(template) -> Iterator[Any]:
    """The template as an engine uses it: padded on the left, no labels. Its length limit holds, so that with
    ``--truncation_strategy left`` the prompt is the one that is trained."""
    with unpacked(template), template.generate_context():
        yield template


def ends_of_responses(template, eos: int | list[int], options: SamplingOptions, model: nn.Module | None = None) -> StoppingCriteriaList:
    """What ends a response: the ids ``eos``, the template's stop words and those of the options."""
    config = GenerationConfig()
    config.stop_words = [*options.stop_words, *template.template_meta.stop_words]
    stops = template.prepare_generate_kwargs({'generation_config': config}, model=model)['stopping_criteria']
    return StoppingCriteriaList([EosTokenCriteria(eos), *stops])


def never_sampled(template) -> list[int]:
    """The ids of media: one in a response would stand for a picture that is not there, and no template could encode it."""
    return list(template.placeholder_tokens) if template.model_meta.is_multimodal else []


def stand_in(template) -> Prompt:
    """For a rank that has to generate with the others and has nothing to answer."""
    inputs = {'messages': [{'role': 'user', 'content': 'a'}]}
    with inference_template(template):
        return Prompt(inputs, template.encode(inputs))


class LocalGenerator:
    """Generates with one model of this process.

    Args:
        template: ms-swift's template of the model that answers, used for collating and stop words.
        lend_model: Gives the bare model for the duration of a generation call; gathers or loads its weights if it has to.
        device: Where the inputs go.
        lockstep: All ranks run each other's number of waves and decoding steps (ZeRO-3 and FSDP shard the weights), so a rank
            without a prompt has to generate too.
        tokens: Prompt and longest possible response, summed over the rows that are answered together; None for what
            :func:`default_tokens` makes of the model.
    """

    def __init__(
        self,
        template,
        lend_model: Callable[[], AbstractContextManager[nn.Module]],
        device: torch.device,
        lockstep: bool = False,
        tokens: int | None = None,
    ):
        self.template, self.lend_model, self.device, self.lockstep, self.tokens = template, lend_model, device, lockstep, tokens

    def __call__(self, prompts: list[Prompt], seeds: list[int], options: SamplingOptions) -> list[Response]:
        """Answer each prompt.

        Args:
            prompts: With ``lockstep`` at least one on every rank.
            seeds: One per prompt; what a prompt is answered depends on no other prompt.
            options: Sampling options.

        Returns:
            One response per prompt.
        """
        if not prompts:
            return []
        answered: dict[int, Response] = {}
        with self.lend_model() as model, evaluation_mode(model), inference_template(self.template) as template, torch.no_grad():
            encoded = [prompt.encoded for prompt in prompts]
            budget = self.tokens or default_tokens(bytes_per_token(model))
            for wave in self._with_stand_ins(waves([len(row['input_ids']) for row in encoded], options.max_tokens, budget)):
                responses = self._answer(model, template, [encoded[n] for n in wave], [seeds[n] for n in wave], options)
                for number, response in zip(wave, responses, strict=True):
                    answered.setdefault(number, response)
        return [answered[number] for number in range(len(prompts))]

    def _with_stand_ins(self, own: list[list[int]]) -> list[list[int]]:
        """In lockstep as many waves as the rank with the most: the others answer their shortest prompt again."""
        if not self.lockstep:
            return own
        most = torch.tensor(len(own), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return own + [own[-1][-1:]] * (most.item() - len(own))

    def _answer(self, model, template, encoded: list[dict[str, Any]], seeds: list[int], options: SamplingOptions) -> list[Response]:
        inputs = template.data_collator([dict(row) for row in encoded])  # it takes some rows apart, and a stand-in comes again
        inputs = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        if template.model_meta.is_multimodal:
            _, inputs = template.pre_forward_hook(model, None, inputs)
        return self._generate(model, template, inputs, seeds, options)

    def _generate(self, model, template, inputs: dict[str, Any], seeds: list[int], options: SamplingOptions) -> list[Response]:
        inputs.pop('labels', None)
        eos = model.generation_config.eos_token_id
        eos = template.tokenizer.eos_token_id if eos is None else eos
        config = GenerationConfig(
            max_new_tokens=options.max_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=eos,
            pad_token_id=template.tokenizer.pad_token_id,
            repetition_penalty=options.repetition_penalty,
            suppress_tokens=never_sampled(template) or None,
        )
        # Decoder-only models return the prompt too, unless it went in as embeddings.
        prompt_length = inputs['input_ids'].shape[1] if inputs.get('inputs_embeds') is None else 0
        finished = FinishedAt(ends_of_responses(template, eos, options, model), prompt_length)
        sequences = template.generate(
            model,
            **inputs,
            generation_config=config,
            logits_processor=sampling_processors(options, seeds, self.device),
            stopping_criteria=StoppingCriteriaList([finished]),
            synced_gpus=self.lockstep,
        )
        new_ids = sequences[:, prompt_length:].tolist()
        return [
            Response(ids, 'length') if length is None else Response(ids[:length], 'stop')
            for ids, length in zip(new_ids, finished.lengths, strict=True)
        ]
