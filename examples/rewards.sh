#!/usr/bin/env bash
# Distillation and rewards in one loss: the student's eight answers to a prompt are compared with the teacher over the whole vocabulary,
# and with each other by a reward function. --gkd_rl_weight 0 only measures; --gkd_loss_weight 0 is GRPO without a teacher.
#
# 蒸馏和奖励合在一个损失里：学生对每条提示作答八次，每个回答在整个词表上和教师比较，八个回答之间再由奖励函数比较高下。
# --gkd_rl_weight 0 只打分；--gkd_loss_weight 0 就是没有教师的 GRPO。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/rewards.sh
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/rewards}

# The rows of a generation batch (per device x accumulation x ranks) have to be a multiple of --gkd_num_samples.
# 一个生成批次的行数（每卡行数 × 累积步数 × 进程数）必须是 --gkd_num_samples 的倍数。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 1 \
    --gkd_num_samples 8 \
    --external_plugins "$HERE/reward.py" \
    --reward_funcs concise \
    --gkd_rl_weight 0.1 \
    --gkd_divergence reverse_kl \
    --temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 \
    --logging_steps 5 \
    --log_completions true \
    --output_dir "$OUTPUT" \
    "$@"
