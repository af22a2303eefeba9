"""Whether an implementation of the sweeps finds what torch operations find: small calls by both, through the whole engine.

That a kernel compiles says little of what it does on a device that nobody tried it on. The calls are of one process, whatever
their numbers are for, and take none from the global generator.
"""

import torch
from torch import Tensor

from . import memory
from ._eager import Eager
from .chunks import Call, LogitsTeacher, Weights, run
from .heads import ReadyLogits
from .kinds import Divergence
from .sharding import Vocabulary
from .stats import TokenStats
from .sweeps import Sweeps
from .topk import TopKTeacher

_TOKENS, _COLUMNS = 3, 2113  # more than a kernel's block of columns, and a multiple of nothing
_POWER = 1.25  # of a teacher's log-probabilities: at another temperature there is more to do
_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative, of numbers in this dtype


def wrong(sweeps: type[Sweeps], divergence: Divergence, device: torch.device, label_temperatures: bool = False) -> str | None:
    """The first number of a call that `sweeps` have wrong, in words, or None. Raises what they raise. label_temperatures: Whether
    labels have a temperature each."""
    temperature = 1.0 if divergence.temperature == 1 else 0.9  # its size makes no other kernel
    divergence = Divergence(divergence.kind, divergence.beta, temperature, divergence.skew)
    for name, call, dtype in _calls(divergence, device, label_temperatures):
        found, right = (_numbers(call, dtype, one) for one in (sweeps, Eager))
        for what, expected in right.items():
            bound = _BOUND[dtype] if what == 'gradient' else _BOUND[torch.float32]
            if not (found[what] - expected).norm() <= bound * expected.norm():  # nor if it is no number
                return f'{what} of {divergence.kind}, {name}'
    gathered = torch.linspace(-3, 3, 2 * _TOKENS, dtype=torch.float64, device=device).view(2, 1, _TOKENS)
    norms = torch.empty(1, _TOKENS, dtype=torch.float64, device=device)
    sweeps(call.setting).combine(gathered, norms)
    return None if torch.allclose(norms, gathered.logsumexp(0)) else 'log-sum-exp over ranks'


def _calls(divergence: Divergence, device: torch.device, label_temperatures: bool) -> list[tuple[str, Call, torch.dtype]]:
    """What each is called, and the dtype that its gradient is written in. Together they start every kernel."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device='cpu').to(device=device)

    def logits(of: Tensor) -> ReadyLogits:
        return ReadyLogits(of, _COLUMNS, divergence.temperature)

    student, teacher = drawn(_TOKENS, _COLUMNS) * 2, drawn(_TOKENS, _COLUMNS) * 2
    logprobs, ids = torch.log_softmax(teacher / (_POWER * divergence.temperature), -1).topk(9)
    labels = torch.tensor([_COLUMNS - 1, -100, 5], device=device)
    labels[2] = ids[2, 1]
    plain = Weights(drawn(_TOKENS))
    at = torch.linspace(0.5, 1.5, _TOKENS, device=device) if label_temperatures else 1.0
    labelled = Weights(drawn(_TOKENS), labels, drawn(_TOKENS), at)
    vocabulary = Vocabulary.whole(_COLUMNS)

    def call(other, weights: Weights, detail: bool = False) -> Call:
        return Call(divergence, logits(student), other, weights, vocabulary, None, TokenStats(detail=detail))

    return [
        ('two heads', call(LogitsTeacher([(0, logits(teacher))]), labelled, detail=True), torch.float32),
        ('one head', call(LogitsTeacher([(0, logits(teacher - student))], difference=True), plain), torch.bfloat16),
        ('top-k', call(TopKTeacher.of(logprobs, ids, 'bucket', None, _COLUMNS, _POWER), labelled), torch.bfloat16),
    ]


def _numbers(call: Call, dtype: torch.dtype, sweeps: type[Sweeps]) -> dict[str, Tensor]:
    """All that comes of a call, in the order in which it is made."""
    gradient = _Gradient(dtype)
    loss, _ = run(call, gradient, sweeps)
    stats = {name: x.clone() for name, x in vars(call.stats).items() if isinstance(x, Tensor)}
    return {**stats, 'loss': loss, 'gradient': gradient.found}


class _Gradient:
    """The gradient with respect to the logits of one chunk, in `dtype` where the sweeps write one."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def place(self, rows: slice, logits: Tensor) -> Tensor:
        return logits if self.dtype == logits.dtype else memory.Rows(*logits.shape, self.dtype, logits.device)[rows]

    def add(self, rows: slice, gradient: Tensor) -> None:
        self.found = gradient.float()
