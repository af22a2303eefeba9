#!/usr/bin/env bash
# Two steps: the teacher's answers are sampled beforehand, fast and once, and then trained on like any dataset (--seq_kd false).
# With LMBDA above 0 the student still answers that share of the samples itself. Where the answers may be sampled during training,
# seq_kd.sh needs no first step.
#
# 两步：先一次性快速采样教师的回答，再像普通数据集一样训练（--seq_kd false）。LMBDA 大于 0 时，这一占比的样本仍由学生自己作答。
# 如果可以在训练中采样，seq_kd.sh 不需要第一步。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/presampled.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/presampled}
LMBDA=${LMBDA:-0.5}
BACKEND=${BACKEND:-vllm}  # or transformers / 或 transformers
ANSWERS=${ANSWERS:-$OUTPUT/teacher_generated_data.jsonl}
INFER_OPTIONS=${INFER_OPTIONS:-}  # further options of the first step / 第一步的其他参数

# Step 1 / 第一步. Answers that exist already are kept. / 已有的回答会保留。
if [[ ! -e $ANSWERS ]]; then
    mkdir -p "$OUTPUT"
    # shellcheck disable=SC2086
    swift infer \
        --model "$TEACHER" \
        --infer_backend "$BACKEND" \
        --val_dataset "$DATASET" \
        --max_new_tokens 512 \
        --temperature 0.9 \
        --write_batch_size 1000 \
        --result_path "$ANSWERS" \
        $INFER_OPTIONS
fi

# Step 2 / 第二步
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type lora \
    --dataset "$ANSWERS" \
    --torch_dtype bfloat16 \
    --seq_kd false \
    --lmbda "$LMBDA" \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --output_dir "$OUTPUT" \
    "$@"
