#!/usr/bin/env bash
# Does it run on these GPUs? Short runs of `swift rlhf` and `megatron rlhf` with tiny random models, on one machine with up to 8 GPUs: each
# passes, or fails with a reason. No network, no models. --help shows the options, --dry runs on a CPU.
#
# 在这台机器的 GPU 上能跑起来吗？用随机初始化的微型模型跑一组 `swift rlhf` 和 `megatron rlhf` 短训练，最多用 8 张 GPU：每项给出通过，
# 或失败及原因。不需要网络，也不需要模型。--help 列出选项，--dry 在 CPU 上试跑。
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/check_cluster/check.py" "$@"
