#!/usr/bin/env bash
# A dense model with megatron-core: both models split over 4 GPUs by tensor parallelism, activations over the same GPUs by sequence
# parallelism, on the responses of the dataset. The teacher waits on the host and visits the GPUs once per optimizer step.
#
# 用 megatron-core 训练稠密模型：学生和教师都按张量并行切到 4 张 GPU 上，激活值用序列并行切到同样的 GPU 上，使用数据集里的回答。
# 教师平时放在主机内存里，每个优化步搬上 GPU 一次。
#
# On 8 GPUs (two data-parallel copies) / 8 张 GPU（两份数据并行）：NPROC_PER_NODE=8 examples/megatron_dense.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-4B}
TEACHER=${TEACHER:-Qwen/Qwen3-32B}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-megatron_output/dense}

PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
megatron rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --offload_teacher_model true \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --tensor_model_parallel_size 4 \
    --sequence_parallel true \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --micro_batch_size 2 \
    --global_batch_size 32 \
    --num_train_epochs 1 \
    --lr 1e-5 \
    --lr_warmup_fraction 0.05 \
    --max_length 2048 \
    --save_steps 100 \
    --output_dir "$OUTPUT" \
    "$@"
