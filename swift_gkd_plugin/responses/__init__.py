"""Where generated responses come from: the student or the teacher, by transformers or by an engine of ms-swift."""

from .sampling import Response, SamplingOptions

__all__ = ['Response', 'SamplingOptions']
