#!/usr/bin/env bash
# SeqKD as plain cross-entropy: the teacher answers every prompt, the student imitates the answers. The divergence has weight 0, so
# that no teacher forward runs; the teacher only generates.
#
# 纯交叉熵的 SeqKD：每条提示由教师作答，学生模仿这些回答。散度权重为 0，因此教师不做前向，只负责生成。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/seqkd_cross_entropy.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/seqkd_cross_entropy}

swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --gkd_loss_weight 0 \
    --sft_alpha 1 \
    --seq_kd true \
    --lmbda 0 \
    --gkd_teacher_temperature 0 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --output_dir "$OUTPUT" \
    "$@"
