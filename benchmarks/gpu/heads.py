"""Output heads and loss, forward and backward, in bf16: the operator beside the products alone and beside others.

`products` is the floor that `ratio` divides by: the logits and the gradients of hidden states and, where it is trained, head,
whole, without any loss, from a random gradient. It is measured before the others of a case and, to see what the GPU's clock did
meanwhile, again after them. `loss` tells whether all compute the same thing; in half precision some are less exact than others.
"""

import torch
from meter import NotHere

TEMPERATURE, BETA, K = 0.9, 0.5, 64
OTHERS = {'jsd': ('liger', 'ms-swift', 'trl'), 'top-k': ('ms-swift',), 'cross-entropy': ('torch', 'liger')}


def run(case: dict, meter):
    torch.manual_seed(0)
    objective, inputs = case['objective'], Inputs(case, meter)
    floor = None
    for name in ('products', 'ours', *OTHERS[objective], 'products again'):
        meter.fresh()
        try:
            row = measured(name, inputs, objective, meter)
        except Exception as error:
            row = meter.failure(error)
        inputs.forget()
        if name == 'products':
            floor = row.get('ms')
        if floor and 'ms' in row:
            row['ratio'] = round(row['ms'] / floor, 3)
        yield {'what': name, **row}
        if row.get('status') == 'failed' and not meter.alive():
            raise RuntimeError(f'the GPU was lost to {name}')


def measured(name: str, inputs: 'Inputs', objective: str, meter) -> dict:
    if name.startswith('products'):
        row = meter.measure(Products(inputs, objective))
        return row | {'tflops': inputs.operations(objective) / row['ms'] / 1e9}
    step = STEPS[name](inputs, objective)
    row = meter.measure(step, kept=inputs.gradient_bytes)
    inputs.forget()
    return row | {'loss': float(step.loss()), **step.about}


class Inputs:
    def __init__(self, case: dict, meter):
        tokens, hidden, vocab = case['tokens'], case['hidden'], case['vocab']
        self.meter = meter
        half = dict(dtype=torch.bfloat16, device=meter.device)
        self.tokens, self.vocab, self.trained = tokens, vocab, case['head'] == 'trained'
        self.hidden = torch.randn(tokens, hidden, **half).requires_grad_()
        self.weight = (torch.randn(vocab, hidden, **half) * hidden**-0.5).requires_grad_(self.trained)
        self.other = torch.randn(tokens, hidden, **half)
        self.head = torch.randn(vocab, hidden, **half) * hidden**-0.5
        self.labels = torch.randint(vocab, (tokens,), device=meter.device)
        self.logprobs = self.ids = None
        if case['objective'] == 'top-k':
            parts = [((x @ self.head.t()).float() / TEMPERATURE).log_softmax(-1).topk(min(K, vocab)) for x in self.other.split(512)]
            self.logprobs, self.ids = (torch.cat([part[i] for part in parts]) for i in range(2))
        self.gradient_bytes = 2 * (self.hidden.numel() + self.trained * self.weight.numel())

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def operations(self, objective: str) -> int:
        """Of the floating-point kind, in the products."""
        number = (2 if objective == 'jsd' else 1) + 1 + self.trained
        return 2 * self.tokens * self.vocab * self.hidden.shape[1] * number


class Products:
    def __init__(self, inputs: Inputs, objective: str):
        self.inputs, self.teacher = inputs, objective == 'jsd'
        self.gradient = torch.randn(inputs.tokens, inputs.vocab, dtype=torch.bfloat16, device=inputs.hidden.device).mul_(1e-3)

    @torch.no_grad()
    def __call__(self) -> None:
        x = self.inputs
        teacher = x.other @ x.head.t() if self.teacher else None
        student = x.hidden @ x.weight.t()
        of_hidden = self.gradient @ x.weight
        of_weight = self.gradient.t() @ x.hidden if x.trained else None
        del teacher, student, of_hidden, of_weight


class Step:
    """Leaves gradients; `about` goes into the row. Nothing waits for the GPU."""

    about: dict = {}

    def __init__(self, inputs: Inputs, objective: str):
        self.inputs = inputs
        self.of = getattr(self, objective.replace('-', '_'))(inputs)

    def loss(self):
        return self.of().detach()

    def __call__(self) -> None:
        self.inputs.forget()
        self.of().backward()


class Ours(Step):
    def __init__(self, inputs: Inputs, objective: str):
        from operator_kernels import kernel_launches

        from swift_gkd_plugin.divergence import Divergence

        self.divergence = Divergence('jsd', BETA, TEMPERATURE)
        super().__init__(inputs, objective)
        with kernel_launches(inputs.meter) as launches:
            self()
        self.about = {'kernels': len(launches)}

    def jsd(self, x):
        from swift_gkd_plugin.divergence import linear_divergence

        return lambda: linear_divergence(x.hidden, x.weight, x.other, x.head, self.divergence, reduction='sum') / x.tokens

    def top_k(self, x):
        from swift_gkd_plugin.divergence import topk_divergence

        return lambda: topk_divergence(x.hidden, x.weight, x.logprobs, x.ids, self.divergence, reduction='sum') / x.tokens

    def cross_entropy(self, x):
        from swift_gkd_plugin.divergence import linear_divergence

        return lambda: linear_divergence(x.hidden, x.weight, None, None, self.divergence, labels=x.labels, reduction='sum') / x.tokens


class MsSwift(Step):
    def __init__(self, inputs: Inputs, objective: str):
        from swift.rlhf_trainers import gkd_loss

        self.gkd = gkd_loss
        self.about = {'version': version('ms-swift')}
        super().__init__(inputs, objective)

    def _loss(self, teacher):
        x = self.inputs
        total, count = self.gkd.gkd_loss((x.hidden @ x.weight.t())[None], teacher, x.labels[None], BETA, TEMPERATURE)
        return total / count

    def jsd(self, x):
        def loss():
            with torch.no_grad():
                logits = (x.other @ x.head.t())[None]
            return self._loss(self.gkd.TeacherOutput(full_logits=logits))

        return loss

    def top_k(self, x):
        return lambda: self._loss(self.gkd.TeacherOutput(topk_logprobs=x.logprobs[None], topk_indices=x.ids[None]))


class Trl(Step):
    def jsd(self, x):
        from trl.experimental.gkd import GKDTrainer

        self.about = {'version': version('trl')}

        def loss():
            with torch.no_grad():
                teacher = (x.other @ x.head.t())[None]
            student = (x.hidden @ x.weight.t())[None]
            return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETA, temperature=TEMPERATURE) / x.tokens

        return loss


class Liger(Step):
    def __init__(self, inputs: Inputs, objective: str):
        import liger_kernel  # noqa: F401

        self.about = {'version': version('liger_kernel')}
        super().__init__(inputs, objective)

    def jsd(self, x):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # Compiled by default, which on a CPU takes longer than it saves.
        fused = LigerFusedLinearJSDLoss(0.0, 1.0, BETA, temperature=TEMPERATURE, compiled=x.hidden.is_cuda)
        return lambda: fused(x.hidden, x.weight, x.other, x.head, x.labels)

    def cross_entropy(self, x):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        if not x.hidden.is_cuda:
            raise NotHere('a Triton kernel only')
        fused = LigerFusedLinearCrossEntropyLoss()
        return lambda: fused(x.weight, x.hidden, x.labels)


class Torch(Step):
    """As transformers computes it: logits in bf16, the loss in fp32."""

    def cross_entropy(self, x):
        return lambda: torch.nn.functional.cross_entropy((x.hidden @ x.weight.t()).float(), x.labels)


STEPS = {'ours': Ours, 'ms-swift': MsSwift, 'trl': Trl, 'liger': Liger, 'torch': Torch}


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
