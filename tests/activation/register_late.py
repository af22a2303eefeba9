"""The Python way, when everything of ms-swift is imported already; other types of training go on as before."""

import sys

from swift.arguments import RLHFArguments
from swift.pipelines import rlhf_main

from swift_gkd_plugin import register

register()

student, train, probe = sys.argv[1:]
common = {'model': student, 'model_type': 'qwen3', 'template': 'qwen3', 'dataset': [train], 'check_model': False, 'use_cpu': True}
dpo = RLHFArguments(rlhf_type='dpo', **common)
assert dpo.padding_side == 'right' and not hasattr(dpo.training_args, 'gkd_skew')
rlhf_main(RLHFArguments(rlhf_type='gkd', external_plugins=[probe], gkd_skew=0.3, **common))
