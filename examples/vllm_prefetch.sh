#!/usr/bin/env bash
# On-policy distillation one step ahead: while a step trains, the server already generates the responses of the next one, from weights
# that are one update older. Everything else is as in vllm_server.sh, which starts the server too:
#
# 提前一步的在线蒸馏：当前这一步训练期间，服务就用晚一次更新的权重生成下一步的回答。其余与 vllm_server.sh 相同，服务也由它启动：
#
#   CUDA_VISIBLE_DEVICES=3 examples/vllm_server.sh rollout
#   CUDA_VISIBLE_DEVICES=0,1,2 NPROC_PER_NODE=3 examples/vllm_prefetch.sh
set -euo pipefail

OUTPUT=${OUTPUT:-output/vllm_prefetch} exec "$(dirname "$0")/vllm_server.sh" --gkd_prefetch true "$@"
