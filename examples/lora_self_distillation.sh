#!/usr/bin/env bash
# LoRA self-distillation with privileged context: teacher and student are one model. The teacher is the base with the adapter off and
# sees the prompt of the column teacher_prompt; the student is the base with the adapter and sees the row's own prompt. What only the
# longer prompt tells goes into the adapter. The weights are loaded once.
#
# Without teacher_prompt (or teacher_images) both are equal at the start, loss and gradient are 0, and nothing is learnt.
#
# 带特权上下文的 LoRA 自蒸馏：教师和学生是同一个模型。教师是关闭适配器的基座，看到 teacher_prompt 列里的提示；学生是基座加适配器，
# 看到这一行自己的提示。只有较长提示里才有的信息会被写进适配器。权重只加载一份。
#
# 没有 teacher_prompt（或 teacher_images）时，两者一开始完全相同，损失和梯度都是 0，什么也学不到。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/lora_self_distillation.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
OUTPUT=${OUTPUT:-output/lora_self_distillation}
DATASET=${DATASET:-$OUTPUT/rows.jsonl}

# Rows to show the format, if no dataset is given: replace them with your own.
# 没有给数据集时，写几行数据说明格式：请换成自己的数据。
if [[ $DATASET == "$OUTPUT/rows.jsonl" ]]; then
    mkdir -p "$OUTPUT"
    for i in $(seq 64); do
        echo "{\"messages\": [{\"role\": \"user\", \"content\": \"What is $i * 7?\"}]," \
            "\"teacher_prompt\": \"The result is $((i * 7)). Explain step by step: what is $i * 7?\"}"
    done > "$DATASET"
fi

swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$MODEL" \
    --tuner_type lora \
    --lora_rank 8 \
    --lora_alpha 16 \
    --target_modules all-linear \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 1 \
    --temperature 0.9 \
    --gkd_temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --output_dir "$OUTPUT" \
    "$@"
