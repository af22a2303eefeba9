#!/usr/bin/env bash
# On-policy distillation: the student answers every prompt and learns from the teacher's distributions on its own answers.
# The dataset needs prompts only.
#
# 在线蒸馏：每条提示都由学生作答，学生在自己的回答上学习教师的分布。数据集只需要提示。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/on_policy.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/on_policy}

# beta 1 is KL(student || teacher), which on-policy distillation often uses; 0.5 is ms-swift's default. --temperature 1 samples from
# the student's plain distribution. Options at the end of this script's own command line override the ones here.
# beta 1 即 KL(学生‖教师)，在线蒸馏常用；ms-swift 的默认值是 0.5。--temperature 1 按学生的原分布采样。
# 写在本脚本命令行末尾的参数会覆盖下面的参数。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 1 \
    --beta 1 \
    --temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --log_completions true \
    --output_dir "$OUTPUT" \
    "$@"
