#!/usr/bin/env bash
# LoRA self-distillation with megatron-core: --teacher_model is --model, so the teacher is the base with the adapter off and its weights
# are loaded once. The rows have a column teacher_prompt: what only the teacher is told goes into the adapter.
#
# 用 megatron-core 做 LoRA 自蒸馏：--teacher_model 就是 --model，教师是关闭适配器的基座，权重只加载一份。数据里有一列 teacher_prompt：
# 只有教师知道的信息会被写进适配器。
#
# On 4 GPUs / 4 张 GPU：DATASET=rows.jsonl NPROC_PER_NODE=4 examples/megatron_lora_self_distillation.sh
# A row / 一行数据：
#   {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "teacher_prompt": "…"}
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-30B-A3B}
DATASET=${DATASET:?a JSONL file with the column teacher_prompt / 带有 teacher_prompt 列的 JSONL 文件}
OUTPUT=${OUTPUT:-megatron_output/lora_self_distillation}

megatron rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$MODEL" \
    --tuner_type lora \
    --lora_rank 8 \
    --lora_alpha 16 \
    --target_modules all-linear \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --temperature 1 \
    --expert_model_parallel_size 4 \
    --micro_batch_size 2 \
    --global_batch_size 16 \
    --num_train_epochs 1 \
    --lr 1e-4 \
    --max_length 2048 \
    --output_dir "$OUTPUT" \
    "$@"
