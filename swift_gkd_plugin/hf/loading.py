"""How a separate teacher is loaded where that is not how the student is: quantised, or spread over devices, host and disk.

Nothing is quantised or moved here: ms-swift makes the quantiser's configuration of its own options, transformers quantises, accelerate's
hooks bring what is elsewhere to the device for a forward.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from swift.model import get_model_info_meta
from swift.utils import get_logger, json_parse_to_dict
from torch import nn
from transformers.utils import is_bitsandbytes_available, is_hqq_available, is_optimum_quanto_available

from ..arguments import OptionError, teacher_offload
from .zero3 import is_zero3

logger = get_logger()

# What a quantiser needs, as pip knows it; the others have kernels of a hub.
PACKAGES = {
    'bnb': ('bitsandbytes', is_bitsandbytes_available),
    'hqq': ('hqq', is_hqq_available),
    'quanto': ('optimum-quanto', is_optimum_quanto_available),
}

SPREAD = ('auto', 'balanced', 'balanced_low_0', 'sequential')


class TeacherLoading:
    """``--teacher_quant_method``, ``--teacher_quant_bits``, ``--teacher_device_map`` and ``--teacher_max_memory``.

    Args:
        args: ms-swift's arguments, with a ``teacher_model`` of its own.

    Raises:
        OptionError: What is asked for cannot be loaded, or not in this layout. No weights have been touched.
    """

    def __init__(self, args: Any):
        self.args = args
        self.info, self.meta = get_model_info_meta(
            args.teacher_model,
            revision=args.teacher_model_revision,
            model_type=args.teacher_model_type,
            use_hf=args.use_hf,
            hub_token=args.hub_token,
        )
        self._check_quantiser()
        quantised = self._quantised_by()
        if quantised:
            self._check_layout(quantised)
        if args.teacher_device_map is not None:
            self._check_device_map()

    def _check_quantiser(self) -> None:
        method = self.args.teacher_quant_method
        if method in (None, 'none'):
            return
        if self.info.quant_method:
            raise OptionError(
                f'--teacher_quant_method {method}: --teacher_model {self.args.teacher_model} is quantised already '
                f'({self.info.quant_method}); leave the option out.'
            )
        package, available = PACKAGES.get(method, (None, None))
        if package and not available():
            raise OptionError(f'--teacher_quant_method {method}: {package} is not installed; pip install {package}.')

    def _quantised_by(self) -> str | None:
        """What makes the teacher a quantised one, in the words of the options; None if it is not."""
        args = self.args
        if self.info.quant_method:
            return f'--teacher_model {args.teacher_model}, which is quantised ({self.info.quant_method}),'
        if args.teacher_quant_method is None and args.quant_method:
            return f'--quant_method {args.quant_method}'
        return None if args.teacher_quant_method in (None, 'none') else f'--teacher_quant_method {args.teacher_quant_method}'

    def _check_layout(self, quantised: str) -> None:
        args = self.args
        if args.deepspeed and is_zero3(args.teacher_deepspeed or args.deepspeed):
            raise OptionError(
                f'{quantised} under ZeRO-3: quantised weights come with state that is not sharded; add --teacher_deepspeed zero0, '
                'which keeps the teacher whole on each rank.'
            )
        if args.fsdp:
            raise OptionError(
                f'{quantised} with --fsdp: quantised weights come with state that is not sharded; use --deepspeed zero3 with '
                '--teacher_deepspeed zero0, or --teacher_model_server.'
            )
        if teacher_offload(args):
            raise OptionError(
                f'{quantised} with --gkd_teacher_offload {teacher_offload(args)}: the scales of quantised weights would stay behind; leave '
                'one of the two out.'
            )

    def _check_device_map(self) -> None:
        args, given = self.args, self.args.teacher_device_map
        if args.deepspeed or args.fsdp:
            instead = '--teacher_deepspeed zero3_offload' if args.deepspeed else '--teacher_model_server'
            raise OptionError(
                f'--teacher_device_map with {"--deepspeed" if args.deepspeed else "--fsdp"}: it places the teacher itself; use {instead}.'
            )
        where = json_parse_to_dict(given, strict=False)
        if isinstance(where, str) and where not in SPREAD:
            try:
                torch.device(where)
            except RuntimeError:
                raise OptionError(
                    f'--teacher_device_map {given}: must be {", ".join(SPREAD)}, a device, a JSON map or a file with one.'
                ) from None
        if where in SPREAD and args.local_world_size > 1:
            raise OptionError(
                f'--teacher_device_map {given} with {args.local_world_size} ranks: each of them would take every device; give a JSON map, '
                "in which the number of a device counts from the rank's own."
            )

    @contextmanager
    def settings(self) -> Iterator[None]:
        """ms-swift's arguments are the teacher's: around its loading."""
        args, kwargs = self.args, self.args.get_model_kwargs
        changed: dict[str, Any] = {}
        if self.info.quant_method or args.teacher_quant_method is not None:
            method = None if self.info.quant_method or args.teacher_quant_method == 'none' else args.teacher_quant_method
            # Which modules stay as they are depends on the model (quant_args.py, get_modules_to_not_convert).
            changed = {'quant_method': method, 'quant_bits': args.teacher_quant_bits}
            changed |= {'model_info': self.info, 'model_meta': self.meta}
            changed |= {'model_dir': self.info.model_dir, 'model_type': self.info.model_type}
        if args.teacher_device_map is not None:
            # Weights that transformers converts while it loads, fused experts say, are written here if they belong on the disk.
            self._folder = tempfile.TemporaryDirectory(prefix=f'teacher_weights_rank{args.rank}_', dir=_made(args.output_dir))
            changed |= {'device_map': args.teacher_device_map, 'max_memory': args.teacher_max_memory}
            changed['get_model_kwargs'] = lambda: {**kwargs(), 'model_kwargs': {'offload_folder': self._folder.name}}
        elif teacher_offload(args) and not args.deepspeed:
            changed['device_map'] = 'cpu'
        before = {name: getattr(args, name) for name in changed if name != 'get_model_kwargs'}
        vars(args).update(changed)
        try:
            if args.teacher_device_map is not None:
                args._init_device_map()
                args._init_max_memory()
            yield
        finally:
            vars(args).pop('get_model_kwargs', None)
            vars(args).update(before)

    def check_loaded(self, model: nn.Module) -> None:
        """Say where the teacher's weights are.

        Raises:
            OptionError: The teacher is to generate, and part of it is not on the device.
        """
        args = self.args
        if self._quantised_by():
            sizes = [(p.nbytes, p.itemsize) for p in (*model.parameters(), *model.buffers())]
            total, rest = sum(n for n, _ in sizes), sum(n for n, itemsize in sizes if itemsize > 1)
            logger.info(f'The quantised teacher takes {total / 2**30:.2f} GiB, {rest / 2**30:.2f} GiB of them for what is not quantised.')
        elsewhere = offloaded_bytes(model)
        if not elsewhere:
            return
        if (args.seq_kd or args.gkd_eval_source == 'teacher') and args.gkd_teacher_engine == 'transformers':
            raise OptionError(
                f'--teacher_device_map {args.teacher_device_map} with --seq_kd: {elsewhere / 2**30:.2f} GiB of the teacher would come to '
                'the device for every token of an answer; use --gkd_teacher_engine vllm or --teacher_model_server.'
            )
        logger.info(f'{elsewhere / 2**30:.2f} GiB of the teacher are on the host or the disk and come to the device with every forward.')


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate's hooks bring a model's parts and inputs together, so that nobody else may move them."""
    return any(hasattr(module, '_hf_hook') for module in model.modules())


def offloaded_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are on the host or the disk, and on the device for the time of a module's forward."""
    parameters = {p for module in model.modules() if has_offloaded_params(module) for p in module.parameters(recurse=False)}
    return sum(p.nbytes for p in parameters)


def _made(directory: str) -> str:
    os.makedirs(directory, exist_ok=True)
    return directory
