"""LoRA adapters of a separate teacher, added to its weights while the bridge reads them from the files.

So the weights are the same in every layout, nothing comes on top of the teacher's memory and of its forward, and its layers are split as
they are without an adapter; Megatron's own adapters would want one A for query, key and value, and experts that are whole on a rank.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mcore_bridge.utils.safetensors import LazyTensor
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from ..arguments import OptionError
from ..checks import CHANGES_BASE, adapter_config, local
from ..step.said import in_one_line

PREFIX = 'base_model.model.'  # of PEFT's names
WEIGHTS = 'adapter_model.safetensors'
MERGED = 'merge it first (swift export --merge_lora true) and give the result as --teacher_model'


def found_adapter(args: Any, adapter: str) -> str:
    """The directory of an adapter, of which can be said by its configuration that it is simply added to the weights.

    Raises:
        OptionError: It is not, or is not there.
    """
    try:
        path = local(args, adapter)
    except Exception as error:  # of whatever hub it is looked for on
        raise OptionError(f'--teacher_adapters {adapter}: it was not found ({in_one_line(error)}).') from None
    config, option = adapter_config(path), f'--teacher_adapters {path}'
    missing = next((name for name in ('adapter_config.json', WEIGHTS) if not os.path.exists(os.path.join(path, name))), None)
    if missing is not None:
        raise OptionError(f'{option}: there is no {missing} in it; give the directory of an adapter.')
    reasons = (
        (config.get('peft_type') != 'LORA', f'is of the type {config.get("peft_type")}, not LORA'),
        (config.get('use_dora'), 'has DoRA'),
        (config.get('bias', 'none') != 'none' or config.get('lora_bias'), 'comes with biases'),
        (str(config.get('init_lora_weights')).startswith(CHANGES_BASE), 'comes with changes of the base'),
        (config.get('target_parameters'), 'adapts parameters, not modules'),
        (config.get('alora_invocation_tokens'), 'is on for some tokens only'),
    )
    why = next((why for applies, why in reasons if applies), None)
    if why is not None:
        raise OptionError(f'{option}: it {why}; {MERGED}.')
    return path


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the base.

    Attributes:
        file: Where its own tensors are.
        names: Of A [r, in] and B [out, r]; of the one tensor that takes the base's place.
        scale: Of the product of B and A.
        embeds: The base is an embedding [in, out], and adapted as its transpose.
    """

    file: Path
    names: tuple[str, ...]
    scale: float = 1.0
    embeds: bool = False

    def shape(self) -> list[int]:
        """Of the tensor that it is for."""
        with safe_open(self.file, 'pt') as file:
            shapes = [file.get_slice(name).get_shape() for name in self.names]
        if len(shapes) == 1:
            return shapes[0]
        out, dim = shapes[1][0], shapes[0][1]
        return [dim, out] if self.embeds else [out, dim]

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """The tensor as it is with the adapter, in fp32: it is rounded once, to the precision of the model."""
        with safe_open(self.file, 'pt') as file:
            tensors = [file.get_tensor(name).float() for name in self.names]
        if len(tensors) == 1:
            return tensors[0]
        a, b = tensors
        first, second = (a.t(), b.t()) if self.embeds else (b, a)
        return torch.addmm(base.float(), first, second, alpha=self.scale)


class MergedAdapters:
    """A converter for the bridge: the base's tensors as they are with the adapters.

    Args:
        paths: Directories of adapters, by :func:`found_adapter`.
        model: The base as the option names it.
        model_dir: Where its files are.
        bridge: The bridge that will read them. Files of different ages name the same tensor differently, and it knows the names.

    Raises:
        OptionError: An adapter of another model. No weights have been read.
    """

    def __init__(self, paths: list[str], model: str, model_dir: str, bridge: Any):
        self._bridge, self._changes = bridge, {}
        base = dict(self._tensors(model_dir))
        for path in paths:
            for module, change in self._changes_of(path):
                name, option = self._canonical(f'{module}.weight'), f'--teacher_adapters {path}'
                if name not in base:
                    raise OptionError(
                        f'{option}: it adapts {module}, and --teacher_model {model} has no weight of this name; give an adapter of this '
                        f'model, or {MERGED}.'
                    )
                shape, dtype = base[name]
                if change.shape() != shape:
                    raise OptionError(
                        f'{option}: {module} is {change.shape()} there and {shape} in --teacher_model {model}; give one of its own.'
                    )
                if dtype not in ('F32', 'F16', 'BF16'):
                    raise OptionError(f'{option}: {module} of --teacher_model {model} is quantised ({dtype}); {MERGED}.')
                self._changes.setdefault(name, []).append(change)

    def __call__(self, key: str, tensor: LazyTensor) -> tuple[str, LazyTensor]:
        changes = self._changes.get(self._canonical(key))
        if changes is None:
            return key, tensor

        def load() -> torch.Tensor:
            weight = tensor.load()
            for change in changes:
                weight = change.of(weight)
            return weight

        return key, LazyTensor(loader=load)

    def _canonical(self, name: str) -> str:
        """The bridge's own name; any that it leaves out stays as it is."""
        return next(iter(self._bridge._convert_hf_state_dict({name: None}, True)), name)

    def _tensors(self, model_dir: str) -> Iterator[tuple[str, tuple[list[int], str]]]:
        """(name, (shape, dtype)) of each tensor of the base, by the headers of its files."""
        index = Path(model_dir, 'model.safetensors.index.json')
        files = set(json.loads(index.read_text())['weight_map'].values()) if index.exists() else {'model.safetensors'}
        for name in sorted(files):
            with safe_open(Path(model_dir, name), 'pt') as file:
                for key in file.keys():  # noqa: SIM118  safetensors has no __iter__
                    part = file.get_slice(key)
                    yield self._canonical(key), (part.get_shape(), part.get_dtype())

    def _changes_of(self, path: str) -> Iterator[tuple[str, Change]]:
        """(module, what the adapter does to its weight)."""
        config, source = adapter_config(path), Path(path, WEIGHTS)
        tied = not self._bridge.config.untie_embeddings_and_output_weights
        with safe_open(source, 'pt') as file:
            names = set(file.keys())
        for name in sorted(names):
            module, _, kind = name.removeprefix(PREFIX).replace('.modules_to_save.', '.').rpartition('.')
            change = None
            if name.endswith('.lora_A.weight'):
                module = module.removesuffix('.lora_A')
                change = Change(source, (name, name.replace('.lora_A.', '.lora_B.')), _scale(config, module, name, source))
            elif kind == 'lora_embedding_A':
                change = Change(source, (name, name[:-1] + 'B'), _scale(config, module, name, source), embeds=True)
            elif kind == 'weight' and '.lora_B.' not in name:
                # With an adapted embedding PEFT saves the embedding too.
                module, change = module.removesuffix('.base_layer'), Change(source, (name,))
            if change is None and not name.endswith(('.lora_B.weight', '.lora_embedding_B')):
                raise OptionError(f'--teacher_adapters {path}: it has {name}, which is not simply added to a weight; {MERGED}.')
            embeds = tied and self._canonical(f'{module}.weight') in (self._bridge.hf_embed_key, self._bridge.hf_lm_head_key)
            if change is not None and embeds:
                raise OptionError(
                    f'--teacher_adapters {path}: it adapts {module}, which is embedding and head at once in --teacher_model; {MERGED}.'
                )
            if change is not None:
                yield module, change


def _scale(config: dict[str, Any], module: str, a: str, source: Path) -> float:
    """PEFT's alpha / r, or alpha / sqrt(r), of one module."""
    with safe_open(source, 'pt') as file:
        rank = file.get_slice(a).get_shape()[0]
    pattern = config.get('alpha_pattern') or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), module), config['lora_alpha'])
    return alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)
