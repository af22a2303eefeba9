#!/usr/bin/env bash
# The same with megatron-core: distillation and rewards in one loss, the student answering by vLLM on the same GPUs.
#
# 用 megatron-core 做同样的事：蒸馏和奖励合在一个损失里，由同一批 GPU 上的 vLLM 替学生生成回答。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/megatron_rewards.sh
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)

MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-megatron_output/rewards}

megatron rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 1 \
    --gkd_num_samples 8 \
    --external_plugins "$HERE/reward.py" \
    --reward_funcs concise \
    --gkd_rl_weight 0.1 \
    --gkd_divergence reverse_kl \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_gpu_memory_utilization 0.4 \
    --sleep_level 1 \
    --temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --log_completions true \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 4 \
    --global_batch_size 32 \
    --num_train_epochs 1 \
    --lr 1e-6 \
    --output_dir "$OUTPUT" \
    "$@"
