#!/usr/bin/env bash
# The same on a machine a quarter of the size: 2 GPUs. Each holds half of the weights, 29.5 GiB, and looks at one sample at a time; the
# batch of an optimizer step is that of 8 GPUs, 32 samples, by accumulation. Responses come from the dataset: under ZeRO-3 every generated
# token would gather the weights of all layers from the other GPU.
#
# With GPUs of 24 GB, DEEPSPEED=zero3_offload keeps the weights in host memory (64 GB of it) and gathers them layer by layer.
#
# 同样的训练，机器只有四分之一大：2 张 GPU。每张放一半权重，29.5 GiB，一次看一个样本；靠梯度累积，一个优化步的批次与 8 张 GPU 时相同，
# 都是 32 个样本。回答取自数据集：ZeRO-3 下每生成一个 token 都要从另一张 GPU 收集所有层的权重。
#
# 24 GB 的 GPU 可以用 DEEPSPEED=zero3_offload：权重放在主机内存（64 GB），逐层收集。
#
# DATASET=rows.jsonl examples/omni_lora_self_distillation_small.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-Omni-30B-A3B-Instruct}
DATASET=${DATASET:?a JSONL file with responses and the column teacher_prompt / 带有回答和 teacher_prompt 列的 JSONL 文件}
OUTPUT=${OUTPUT:-output/omni_lora_self_distillation_small}
DEEPSPEED=${DEEPSPEED:-zero3}
export NPROC_PER_NODE=${NPROC_PER_NODE:-2}
export ENABLE_AUDIO_OUTPUT=${ENABLE_AUDIO_OUTPUT:-0}  # the talker is not loaded / 不加载负责语音输出的 talker
export IMAGE_MAX_TOKEN_NUM=${IMAGE_MAX_TOKEN_NUM:-512} VIDEO_MAX_TOKEN_NUM=${VIDEO_MAX_TOKEN_NUM:-64}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

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
    --torch_dtype bfloat16 \
    --attn_impl flash_attention_2 \
    --gradient_checkpointing true \
    --deepspeed "$DEEPSPEED" \
    --lmbda 0 \
    --beta 0.5 \
    --temperature 1 \
    --gkd_temperature 2 \
    --max_length 2048 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --learning_rate 1e-5 \
    --warmup_ratio 0.05 \
    --dataloader_num_workers 4 \
    --dataset_num_proc 4 \
    --logging_steps 5 \
    --save_steps 50 \
    --save_total_limit 2 \
    --save_only_model true \
    --output_dir "$OUTPUT" \
    "$@"
