"""The Python way, from a command line in a list."""

import sys

from swift_gkd_plugin import register

register()

from swift.pipelines import rlhf_main  # noqa: E402  after register()

student, train, probe = sys.argv[1:]
rlhf_main(
    f'--rlhf_type gkd --model {student} --model_type qwen3 --template qwen3 --dataset {train} --check_model false --use_cpu true '
    f'--external_plugins {probe} --gkd_skew 0.3 --train_type lora'.split()
)
