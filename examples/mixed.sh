#!/usr/bin/env bash
# Mixed sources: the student answers a share lmbda of the samples, the teacher (SEQ_KD=true) or the dataset (SEQ_KD=false) the rest.
# The source is drawn for each sample; one micro-batch may hold several. All parameters are trained.
#
# 混合来源：学生回答占比 lmbda 的样本，其余由教师（SEQ_KD=true）或数据集（SEQ_KD=false）提供。来源按样本抽取，
# 一个微批里可以有多种来源。全参数训练。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/mixed.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/mixed}
LMBDA=${LMBDA:-0.5}
SEQ_KD=${SEQ_KD:-true}

# sft_alpha adds cross-entropy, on samples that the student did not answer. Several GPUs: add --deepspeed zero2.
# sft_alpha 在不是学生作答的样本上加交叉熵。多 GPU 时可加 --deepspeed zero2。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type full \
    --dataset "$DATASET" \
    --split_dataset_ratio 0.01 \
    --torch_dtype bfloat16 \
    --lmbda "$LMBDA" \
    --seq_kd "$SEQ_KD" \
    --sft_alpha 0.1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 \
    --logging_steps 5 \
    --eval_steps 50 \
    --save_steps 50 \
    --output_dir "$OUTPUT" \
    "$@"
