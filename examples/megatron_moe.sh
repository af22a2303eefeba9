#!/usr/bin/env bash
# A mixture of experts learns from a larger one. The experts of both are split over the GPUs one by one (expert parallelism), the layers
# over two pipeline stages; the teacher looks at all micro-batches of a step in one pass of the pipeline.
#
# 混合专家模型向更大的混合专家模型学习。两者的专家逐个分到各张 GPU 上（专家并行），层分成两个流水级；教师在一次流水线调度里看完
# 一步的所有微批。
#
# On 16 GPUs / 16 张 GPU：
#   NNODES=2 NODE_RANK=… MASTER_ADDR=… NPROC_PER_NODE=8 examples/megatron_moe.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-30B-A3B}
TEACHER=${TEACHER:-Qwen/Qwen3-235B-A22B}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-megatron_output/moe}

PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
megatron rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --offload_teacher_model true \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --expert_model_parallel_size 8 \
    --pipeline_model_parallel_size 2 \
    --moe_aux_loss_coeff 1e-6 \
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
