"""The output head belongs to the loss.

The model's forward must stop at the hidden states, so that [tokens, vocab] logits never exist as a whole, and yet run through the
wrapped model, so that DDP, ZeRO-3 and FSDP see every parameter that they manage, the head's included. So the head *module* is asked
for something else while the forward runs: its ``forward`` is replaced for the duration of the call, by the loss (student) or by a
selection of hidden states (teacher). The result leaves the model where logits would: ZeRO-3 and FSDP hang their backward hooks on
module outputs, and a value carried out by a closure would miss them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn

from ..divergence import LogitTransform, linear_logits


@dataclass(frozen=True)
class PostProcessing:
    """What a family of models does to the logits after the head, and the value that switches it off.

    Attributes:
        owner: ``config`` (the text model's configuration), ``model`` (the module itself) or ``base`` (the model without its head).
        attribute: Where the number is.
        neutral: The value with which nothing happens.
        transform: The operator's counterpart, from the number.
        only, never: ``model_type`` of the configuration or of its text model, where other families give the attribute another meaning.
    """

    owner: str
    attribute: str
    neutral: float | None
    transform: Callable[[float], LogitTransform]
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()

    def concerns(self, model_types: set[str]) -> bool:
        return model_types.isdisjoint(self.never) and (not self.only or not model_types.isdisjoint(self.only))


# Families that cap without asking whether there is a cap get one that is far away. A power of two: dividing and multiplying by it is
# exact, and tanh(x) is x so close to 0.
FAR_AWAY = 2.0**40

_CAPS_ALWAYS = ('muse_glimmer', 'muse_glimmer_text')
_MULTIPLIES = ('hyperclovax', 'hyperclovax_vision_v2')

# Read off transformers 5.19 and listed in docs_en/loss.md; a family that is not in the list is found out by OutputHead.verify().
POST_PROCESSING = (
    PostProcessing(
        'config',
        'final_logit_softcapping',
        None,
        lambda cap: LogitTransform(softcap=cap),
        never=(*_CAPS_ALWAYS, 'paligemma'),  # PaliGemma 2 doesn't apply its text model's cap
    ),
    PostProcessing('config', 'final_logit_softcapping', FAR_AWAY, lambda cap: LogitTransform(softcap=cap), only=_CAPS_ALWAYS),
    PostProcessing('config', 'logits_soft_cap', FAR_AWAY, lambda cap: LogitTransform(softcap=cap)),
    PostProcessing('config', 'output_multiplier', 1.0, lambda scale: LogitTransform(scale=scale)),
    PostProcessing('model', 'logit_scale', 1.0, lambda scale: LogitTransform(scale=scale)),
    PostProcessing(
        'config',
        'logits_scaling',
        1.0,
        lambda scaling: LogitTransform(scale=1.0 / scaling),
        never=(*_MULTIPLIES, 'minicpm3'),  # MiniCPM 3 divides the hidden states, in front of the head
    ),
    PostProcessing('config', 'logits_scaling', 1.0, lambda scale: LogitTransform(scale=scale), only=_MULTIPLIES),
    PostProcessing('base', 'lm_head_multiplier', 1.0, lambda scale: LogitTransform(scale=scale)),
)

# Size of the logits, and of the value in the place of logits, with which OutputHead.verify() looks for post-processing.
_PROBE = 1000.0


@dataclass(frozen=True)
class HeadTensors:
    """An output head as :mod:`swift_gkd_plugin.divergence` takes it: logits = transform(hidden @ weight.T + bias + low-rank term)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform | None
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def detached(self, device: torch.device | None = None, copy: bool = False) -> HeadTensors:
        """The same values without a gradient.

        Args:
            device: Where they are wanted; None for where they are.
            copy: Clone them, for their memory will hold other values.
        """

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(device or tensor.device, copy=copy)

        lora = None if self.lora is None else (kept(self.lora[0]), kept(self.lora[1]), self.lora[2])
        return HeadTensors(kept(self.weight), None if self.bias is None else kept(self.bias), self.transform, lora)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, dim] -> [n, vocab] in fp32 from inputs of any precision; for a few tokens, and without a gradient."""
        return linear_logits(hidden, self.weight, bias=self.bias, lora=self.lora, transform=self.transform)

    def logits_with_gradient(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same by autograd, through fp32 copies of the tensors."""
        logits = F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        if self.lora is not None:
            a, b, scaling = self.lora
            logits = logits + hidden.float() @ a.float().t() @ b.float().t() * scaling
        if self.transform is not None:
            logits = logits * self.transform.scale
            if self.transform.softcap is not None:
                logits = self.transform.softcap * torch.tanh(logits / self.transform.softcap)
        return logits


@torch.compiler.disable
def _in_its_place(executed: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a head does while it is replaced. One function for all calls, so that a model that torch compiles (``--torch_compile``) stays
    compiled up to its head and behind it."""
    return executed.in_its_place(hidden)


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; adapters stay in place."""
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


def language_model(model: nn.Module) -> nn.Module:
    """The part of a transformers model that has the decoder and the output head: an Omni model's thinker, else the model itself."""
    return getattr(model, 'thinker', model)


class OutputHead:
    """The output head of one transformers (or PEFT) model.

    Attributes:
        transform: What the model does to its logits after the head; None if nothing.
        dense: Why the head can't be intercepted, one line; None if it can.
    """

    def __init__(self, model: nn.Module):
        self.outer, self.model = model, unwrap_peft(model)
        self.module: nn.Module | None = language_model(self.model).get_output_embeddings()
        self.post_processing = self._post_processing()
        self.transform = self._transform()  # now: while the head is replaced, the model's attributes say that nothing happens
        self.dense = self._why_dense()

    @property
    def columns(self) -> int:
        """Rows of the head's weight, i.e. columns of the logits, also while the weight is sharded."""
        if self.dense:
            return self.model.config.get_text_config().vocab_size
        return self._linear.out_features

    @property
    def width(self) -> int:
        """What the loss gets of a token: the numbers of a hidden state, or of a row of logits."""
        return self.columns if self.dense else self._linear.in_features

    @property
    def _linear(self) -> nn.Module:
        return getattr(self.executed(adapter=False), 'base_layer', self.executed(adapter=False))

    def _why_dense(self) -> str | None:
        if self.module is None:
            return f'{type(self.model).__name__}.get_output_embeddings() is None'
        base = getattr(self.module, 'base_layer', self.module)
        base = getattr(base, 'original_module', base)
        if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
            return f'the output head is a {type(base).__name__}, not a linear layer'
        if hasattr(self.module, 'base_layer'):
            return self._why_lora_is_dense()
        return None

    def _why_lora_is_dense(self) -> str | None:
        layer = self.module
        active = [name for name in layer.active_adapters if name in getattr(layer, 'lora_A', {})]
        if not hasattr(layer, 'lora_A') or len(active) > 1:
            return 'the output head has another adapter than one LoRA'
        if any(layer.use_dora.get(name) for name in active):
            return 'the output head has DoRA'
        if any(getattr(layer.lora_dropout[name], 'p', 0) for name in active):
            return 'the output head has LoRA with dropout'
        if hasattr(layer.base_layer.weight, 'ds_id'):
            return 'the output head has LoRA under ZeRO-3'
        return None

    def executed(self, adapter: bool | str) -> nn.Module:
        """The module whose forward runs: PEFT's ``modules_to_save`` keeps trained copies and the original side by side.

        Args:
            adapter: Its name; True for the active one, False for none.
        """
        if not hasattr(self.module, 'modules_to_save'):
            return self.module
        names = [name for name in self._names(self.module, adapter) if name in self.module.modules_to_save]
        return self.module.modules_to_save[names[0]] if names else self.module.original_module

    @staticmethod
    def _names(module: nn.Module, adapter: bool | str) -> list[str]:
        if adapter is True:
            return module.active_adapters
        return [adapter] if adapter else []

    def _post_processing(self) -> list[tuple[Any, PostProcessing, float]]:
        config = self.model.config.get_text_config()
        owners = {'config': config, 'model': self.model, 'base': self.model.base_model}
        found = []
        for item in POST_PROCESSING:
            if item.concerns({self.model.config.model_type, config.model_type}):
                value = getattr(owners[item.owner], item.attribute, item.neutral)
                if value != item.neutral and value is not None:
                    found.append((owners[item.owner], item, value))
        return found

    def _transform(self) -> LogitTransform | None:
        transforms = [item.transform(value) for _, item, value in self.post_processing]
        if not transforms:
            return None
        # MuseGlimmer scales and then caps, the other families do one of the two.
        return LogitTransform(math.prod(t.scale for t in transforms), next((t.softcap for t in transforms if t.softcap), None))

    def tensors(self, adapter: bool | str = True) -> HeadTensors:
        """The head's tensors, to be read while they are whole: inside the head's own forward or inside :meth:`gathered`."""
        executed = self.executed(adapter)
        base = getattr(executed, 'base_layer', executed)
        lora = None
        if hasattr(executed, 'lora_A') and not executed.disable_adapters:
            for name in self._names(executed, adapter):  # one at most has a LoRA here, see _why_lora_is_dense()
                if name in executed.lora_A:
                    lora = (executed.lora_A[name].weight, executed.lora_B[name].weight, executed.scaling[name])
        return HeadTensors(base.weight, base.bias, self.transform, lora)

    def operand(self, hidden: torch.Tensor, adapter: bool | str = True) -> torch.Tensor:
        """Hidden states in the dtype in which the head's product would take them: autocast's, or that of its weight. In the head's own
        forward, and where autocast is as the model has it; the operator rounds a weight of another dtype to theirs."""
        device_type, executed = hidden.device.type, self.executed(adapter)
        if torch.is_autocast_enabled(device_type):
            return hidden.to(torch.get_autocast_dtype(device_type))
        return hidden.to(getattr(executed, 'base_layer', executed).weight.dtype)

    @contextmanager
    def replaced(self, forward: Callable[[torch.Tensor], torch.Tensor], adapter: bool | str = True, raw: bool = True) -> Iterator[None]:
        """Let the head return ``forward(hidden)`` instead of logits.

        Args:
            forward: Takes the head's input [batch, sequence, dim].
            adapter: Which adapter is on in this forward, see :meth:`executed`.
            raw: Switch the model's own post-processing of logits off, since the result is something else.
        """
        executed = self.executed(adapter)
        changed = self.post_processing if raw else []
        before = executed.__dict__.get('forward')
        executed.in_its_place, executed.forward = forward, MethodType(_in_its_place, executed)
        for owner, item, _ in changed:
            setattr(owner, item.attribute, item.neutral)
        try:
            yield
        finally:
            for owner, item, value in changed:
                setattr(owner, item.attribute, value)
            del executed.in_its_place
            if before is None:
                del executed.forward
            else:
                executed.forward = before

    def gathered(self, adapter: bool | str = True):
        """A context in which :meth:`tensors` are whole outside the head's forward, for a model whose weights are sharded."""
        executed = self.executed(adapter)
        # Not the attribute weight: read in the middle of a forward, ZeRO-3 would give it to the module that runs, for good.
        parameters = list(executed.parameters())
        if hasattr(parameters[0], 'ds_id'):
            import deepspeed

            return deepspeed.zero.GatheredParameters(parameters)
        if hasattr(parameters[0], 'full_tensor'):
            return self._unsharded(executed)
        return align_module_device(executed)  # from host or disk, if accelerate's hooks keep it there

    @contextmanager
    def _unsharded(self, executed: nn.Module) -> Iterator[None]:
        """FSDP2: the head is in a group with its neighbours (accelerate puts it into one with the last norm) or in the root's."""
        owner = next(m for m in (executed, self.module, self.model, self.outer) if hasattr(m, 'unshard'))
        owner.unshard()
        try:
            yield
        finally:
            owner.reshard()

    def verify(self, forward: Callable[[], Any], index: torch.Tensor) -> str | None:
        """Compare a few tokens' logits from :meth:`tensors` with the model's own.

        Args:
            forward: Runs the model on one micro-batch and returns its output.
            index: Positions in the flattened [batch * sequence] to compare, at least one. Each is compared as it is and scaled up to
                logits of 1000, so that a soft cap shows that hardly bends the logits of this batch.

        Returns:
            Why the head can't be intercepted, one line; None if the logits agree.
        """
        if self.dense:
            return self.dense
        executed = self.executed(adapter=True)
        original = executed.forward
        ours: dict[str, torch.Tensor] = {}

        def few(hidden: torch.Tensor) -> torch.Tensor:
            chosen = self.operand(hidden.reshape(-1, hidden.shape[-1])[index.to(hidden.device)])
            with align_module_device(executed):
                head = self.tensors()
                chosen = chosen.to(head.weight.device)
                largest = head.logits(chosen).nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
                chosen = torch.cat([chosen, (chosen * (_PROBE / largest.clamp_min(1e-3))).to(chosen.dtype)])
                ours['logits'] = head.logits(chosen)
            return original(chosen)[None]

        with torch.no_grad(), self.replaced(few, raw=False):
            theirs = forward().logits
        mine = ours.get('logits')
        if mine is None:
            self.dense = 'the model does not call its output head'
        elif theirs.shape[-2:] != mine.shape:
            self.dense = f'the model turns logits of shape {tuple(mine.shape)} into {tuple(theirs.shape[-2:])}'
        else:
            theirs = theirs.reshape(mine.shape).to(mine.device, torch.float32)
            finite = theirs.isfinite() & mine.isfinite()
            scale = theirs.masked_fill(~finite, 0).abs().amax(-1, keepdim=True).clamp_min(1e-6)
            error = ((mine - theirs).masked_fill(~finite, 0).abs() / scale).max().item()
            # bf16 rounds a logit to 1/256 of itself; a missing scale or cap is off by far more.
            if error > 2e-2 or not torch.equal(theirs.isfinite(), mine.isfinite()):
                self.dense = f'the model post-processes its logits in a way that is not in the list (relative difference {error:.2g})'
            elif self.post_processing:
                self.dense = self._not_switched_off(forward)
        return self.dense

    def _not_switched_off(self, forward: Callable[[], Any]) -> str | None:
        """Whether the post-processing still happens to what is returned in the place of logits."""
        with torch.no_grad(), self.replaced(lambda hidden: hidden.new_full((), _PROBE, dtype=torch.float32)):
            returned = forward().logits.item()
        return None if returned == _PROBE else f"the model's post-processing can't be switched off ({_PROBE} became {returned:.6g})"


@dataclass(frozen=True)
class KeptHead:
    """A head with tensors of another time: that of a model whose parameters have changed since.

    Attributes:
        head: Whose they are.
        kept: :meth:`OutputHead.tensors` of then.
    """

    head: OutputHead
    kept: HeadTensors

    def executed(self, adapter: bool) -> nn.Module:
        return self.head.executed(adapter)

    def tensors(self, adapter: bool = True) -> HeadTensors:
        return self.kept

    def gathered(self, adapter: bool = True) -> AbstractContextManager:
        return nullcontext()
