#!/usr/bin/env bash
# Sequence-level distillation with the teacher's distributions: the teacher answers every prompt, and the student learns the whole
# distribution at each token of the answer. The dataset needs prompts only.
#
# 序列级蒸馏，并使用教师的分布：每条提示由教师作答，学生在回答的每个 token 上学习教师的整个分布。数据集只需要提示。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/seq_kd.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/seq_kd}

# beta 0 is KL(teacher || student). The teacher samples at a temperature of its own; 0 would be greedy.
# beta 0 即 KL(教师‖学生)。教师采样用单独的温度；0 表示贪心解码。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --seq_kd true \
    --beta 0 \
    --temperature 1 \
    --gkd_teacher_temperature 0.7 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --output_dir "$OUTPUT" \
    "$@"
