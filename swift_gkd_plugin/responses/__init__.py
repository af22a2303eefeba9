"""Where generated responses come from: the student or the teacher, by transformers or by an engine of ms-swift."""

from .sampling import Prompt, Response, SamplingOptions

__all__ = ['Prompt', 'Response', 'SamplingOptions']
