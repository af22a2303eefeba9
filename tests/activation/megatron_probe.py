"""As probe.py, for Megatron-SWIFT: ends the process where it would set up torch.distributed."""

import json
import os

from swift.megatron.arguments.sft_args import MegatronSftArguments


def tell(self):
    print(
        'PROBE '
        + json.dumps({'args': {k: v for k, v in vars(self).items() if isinstance(v, int | float | str | list | None)}}, default=str),
        flush=True,
    )
    os._exit(0)


MegatronSftArguments._init_output_dir = tell
