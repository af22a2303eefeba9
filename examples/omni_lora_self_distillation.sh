#!/usr/bin/env bash
# LoRA self-distillation of Qwen3-Omni-30B-A3B on 8 GPUs under ZeRO-3. --teacher_model is --model, so one copy of the weights serves both:
# the student is the base with the adapter (trainable), the teacher the base with the adapter off (frozen). Each GPU holds an eighth of it,
# 7.4 GiB; docs_en/memory.md has the rest.
#
# The teacher has to know more than the student, or both are equal and nothing is learnt: the rows have a column teacher_prompt (or
# teacher_images).
#
# 在 8 张 GPU 上用 ZeRO-3 对 Qwen3-Omni-30B-A3B 做 LoRA 自蒸馏。--teacher_model 就是 --model，两者共用一份权重：学生是基座加适配器（可训练），
# 教师是关闭适配器的基座（冻结）。每张 GPU 只放八分之一，即 7.4 GiB；其余见 docs_zh/memory.md。
#
# 教师必须比学生知道得多，否则两者相同，什么也学不到：数据里要有 teacher_prompt（或 teacher_images）列。
#
# A row / 一行数据：
#   {"messages": [{"role": "user", "content": "<audio>What is said?"}, {"role": "assistant", "content": "…"}], "audios": ["a.wav"],
#    "teacher_prompt": "<audio>The speaker is at a station. What is said?"}
#
# DATASET=rows.jsonl examples/omni_lora_self_distillation.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-Omni-30B-A3B-Instruct}
DATASET=${DATASET:?a JSONL file with the column teacher_prompt / 带有 teacher_prompt 列的 JSONL 文件}
OUTPUT=${OUTPUT:-output/omni_lora_self_distillation}
export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
export ENABLE_AUDIO_OUTPUT=${ENABLE_AUDIO_OUTPUT:-0}  # the talker is not loaded / 不加载负责语音输出的 talker
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# The student answers half of the samples, by transformers. ds3_gather_for_generation true would be faster and needs room for the whole
# model (59 GiB) on every GPU. The towers and their projectors are frozen, so what they compute is computed once for both.
# 一半样本由学生作答，用 transformers 生成。ds3_gather_for_generation true 更快，但每张 GPU 都要放得下整个模型（59 GiB）。
# 视觉塔、音频塔及其投影层是冻结的，它们的结果只算一次，供两者共用。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$MODEL" \
    --tuner_type lora \
    --lora_rank 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --target_modules all-linear \
    --freeze_vit true \
    --freeze_aligner true \
    --dataset "$DATASET" \
    --split_dataset_ratio 0.01 \
    --torch_dtype bfloat16 \
    --attn_impl flash_attention_2 \
    --deepspeed zero3 \
    --ds3_gather_for_generation false \
    --lmbda 0.5 \
    --seq_kd false \
    --beta 0.5 \
    --temperature 1 \
    --gkd_temperature 2 \
    --max_length 2048 \
    --max_completion_length 512 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --learning_rate 1e-5 \
    --warmup_ratio 0.05 \
    --dataloader_num_workers 4 \
    --dataset_num_proc 4 \
    --logging_steps 5 \
    --eval_steps 50 \
    --save_steps 50 \
    --save_total_limit 2 \
    --save_only_model true \
    --output_dir "$OUTPUT" \
    "$@"
