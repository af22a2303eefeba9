"""Sampling in which each row has random numbers of its own.

``transformers.generate`` draws from the global generator, so a token depends on what else is in the batch, on the rank and on
everything that was random before. Here the noise of a row comes from a generator that is seeded for that row, so a response is a
function of the weights, the prompt and the row's seed: the same however rows are split over batches and ranks, and after a resume.
The draw is exact: ``argmax(log p + g)`` with Gumbel noise ``g`` is a sample of ``p`` (the Gumbel-max trick).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class SamplingOptions:
    """ms-swift's sampling options, with its conventions for "off".

    Attributes:
        max_tokens: Limit of a response, in tokens.
        temperature: 0 is greedy.
        top_k: <= 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        stop_words: Strings that end a response, besides the template's own.
        vocab_size: Ids from here on are never sampled; None for all that the model has.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_words: tuple[str, ...] = ()
    vocab_size: int | None = None


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        inputs: Of ``template.encode``, without a response.
        encoded: What that makes of them where the template generates.
    """

    inputs: dict[str, Any]
    encoded: dict[str, Any]


@dataclass(frozen=True)
class Response:
    """A generated response.

    Attributes:
        token_ids: The sampled ids, with the one that ended it; empty if the engine sampled none.
        finish_reason: ``stop``, or ``length`` if the limit cut it off.
    """

    token_ids: list[int]
    finish_reason: str

    @property
    def cut_off(self) -> bool:
        return self.finish_reason == 'length'


def sampling_processors(options: SamplingOptions, seeds: list[int], device: torch.device) -> LogitsProcessorList:
    """What turns a model's scores [rows, vocab] into those of which the largest is the sample; ``seeds`` has one per row."""
    processors = LogitsProcessorList()
    if options.vocab_size is not None:
        processors.append(WithinVocabulary(options.vocab_size))
    if options.temperature > 0:
        processors.append(RowSeededSampling(options, seeds, device))
    return processors


class WithinVocabulary(LogitsProcessor):
    """Keeps to the ids that both models have: of two heads of one family the longer one has rows that no token belongs to."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class RowSeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling: adds each row's own Gumbel noise to its warped scores.

    Args:
        options: Temperature and filters, applied in the order of transformers.
        seeds: One seed per row of the batch.
        device: Where the scores are.
    """

    def __init__(self, options: SamplingOptions, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.warpers = LogitsProcessorList()
        if options.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k > 0:
            self.warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self.warpers.append(TopPLogitsWarper(options.top_p))
        if options.min_p > 0:
            self.warpers.append(MinPLogitsWarper(options.min_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [rows, vocab] in, noisy scores out."""
        scores = self.warpers(input_ids, scores.float())
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_()


class FinishedAt(StoppingCriteria):
    """Remembers for each row how many tokens it had when the first of ``criteria`` ended it.

    What follows in the tensor is padding, and the padding id can be an ordinary token or the end-of-sequence id itself, so the
    length can't be told from the ids afterwards.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt_length: int):
        self.criteria, self.prompt_length = criteria, prompt_length
        self.lengths: list[int | None] | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        done = self.criteria(input_ids, scores, **kwargs)
        if self.lengths is None:
            self.lengths = [None] * len(input_ids)
        new = input_ids.shape[1] - self.prompt_length
        for i, ended in enumerate(done.tolist()):
            if ended and self.lengths[i] is None:
                self.lengths[i] = new
        return done
