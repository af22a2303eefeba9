#!/usr/bin/env bash
# Student and teacher in different layouts on the same GPUs: the student fits on one and trains data-parallel on eight, the teacher's
# layers are split over all of them. What the student's ranks train on goes to the teacher together, its hidden states come back.
#
# 同样的 GPU 上，学生和教师使用不同的布局：学生一张卡放得下，在八张卡上数据并行；教师的每一层切到全部八张卡上。各进程的样本集中给教师，
# 教师的隐藏状态再回到各自的进程。
#
# On 8 GPUs / 8 张 GPU：
#   NPROC_PER_NODE=8 examples/megatron_teacher_layout.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-4B}
TEACHER=${TEACHER:-Qwen/Qwen3-32B}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-megatron_output/teacher_layout}

PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
megatron rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --teacher_tensor_model_parallel_size "${TEACHER_TP:-8}" \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --micro_batch_size 1 \
    --global_batch_size 64 \
    --num_train_epochs 1 \
    --lr 1e-5 \
    --max_length 4096 \
    --save_steps 100 \
    --output_dir "$OUTPUT" \
    "$@"
