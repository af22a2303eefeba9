#!/usr/bin/env bash
# A dense teacher of 32B beside its student on one GPU of 48 GB: 4 bits take a quarter of its memory. Only the teacher is quantised, its
# output head keeps its own precision. pip install bitsandbytes
#
# 在一张 48 GB 的 GPU 上，32B 的稠密教师与学生放在一起：4 比特只占四分之一的显存。只量化教师，它的输出头保持原来的精度。
# 先 pip install bitsandbytes
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/quantised_teacher.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-32B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/quantised_teacher}

swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --teacher_quant_method bnb \
    --teacher_quant_bits 4 \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --beta 0.5 \
    --temperature 1 \
    --max_length 2048 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --output_dir "$OUTPUT" \
    "$@"
