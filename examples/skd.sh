#!/usr/bin/env bash
# Supervised KD on the responses of the dataset: alpha * KL + (1 - alpha) * cross-entropy, the KL softened by a temperature.
# KL_DIRECTION=forward is KL(teacher || student), reverse is KL(student || teacher).
#
# 在数据集的回答上做有监督蒸馏（SKD）：alpha * KL + (1 - alpha) * 交叉熵，KL 用温度软化。
# KL_DIRECTION=forward 是 KL(教师‖学生)，reverse 是 KL(学生‖教师)。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/skd.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-1.7B}
TEACHER=${TEACHER:-Qwen/Qwen3-8B}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/skd}
ALPHA=${ALPHA:-0.5}
TEMPERATURE=${TEMPERATURE:-4}
KL_DIRECTION=${KL_DIRECTION:-reverse}

# The gradient of the KL shrinks with the square of its temperature; --gkd_temperature_squared true makes up for it (Hinton et al.).
# KL 的梯度随温度的平方减小；--gkd_temperature_squared true 把它补回来（Hinton 等）。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --enable_thinking false \
    --lmbda 0 \
    --gkd_divergence "${KL_DIRECTION}_kl" \
    --gkd_temperature "$TEMPERATURE" \
    --gkd_temperature_squared true \
    --gkd_loss_weight "$ALPHA" \
    --sft_alpha "$(awk -v alpha="$ALPHA" 'BEGIN { print 1 - alpha }')" \
    --max_length 2048 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 2e-5 \
    --num_train_epochs 3 \
    --logging_steps 5 \
    --output_dir "$OUTPUT" \
    "$@"
