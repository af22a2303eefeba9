#!/usr/bin/env bash
# On-policy distillation with megatron-core: half of the samples are answered by the student as it is at that step, by vLLM on the same
# GPUs. Each sample draws for itself; the ranks that share a model share the prompts out.
#
# 用 megatron-core 做在线蒸馏：一半的样本由当前这一步的学生回答，由同一批 GPU 上的 vLLM 生成。每个样本各自抽签；共同承载一个模型的
# 进程分摊这些提示。
#
# With a server of `swift rollout` on other GPUs (see vllm_server.sh), which can answer the next step while this one trains:
# 另用其他 GPU 上的 `swift rollout` 服务（见 vllm_server.sh），当前步训练时就可以生成下一步的回答：
#   examples/megatron_on_policy.sh --vllm_mode server --vllm_server_host HOST --vllm_server_port 8000 --gkd_prefetch true
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/megatron_on_policy.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-megatron_output/on_policy}

megatron rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0.5 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_gpu_memory_utilization 0.4 \
    --sleep_level 1 \
    --max_completion_length 512 \
    --temperature 0.9 \
    --gkd_temperature 1 \
    --log_completions true \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 4 \
    --global_batch_size 16 \
    --num_train_epochs 1 \
    --lr 1e-5 \
    --max_length 2048 \
    --output_dir "$OUTPUT" \
    "$@"
