#!/usr/bin/env bash
# On-policy distillation with vLLM inside the training processes: the engine samples from the student's new weights after each update
# and gives its memory back while the student trains.
#
# 在线蒸馏，vLLM 与训练在同一批进程里：每次更新后引擎用学生的新权重采样，训练期间把显存让出来。
#
# vLLM wants to be started as a rank, hence NPROC_PER_NODE with one GPU too. On 4 GPUs: NPROC_PER_NODE=4 examples/vllm_colocate.sh
# vLLM 需要作为一个 rank 启动，因此单卡也要设置 NPROC_PER_NODE。4 张 GPU：NPROC_PER_NODE=4 examples/vllm_colocate.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/vllm_colocate}
export NPROC_PER_NODE=${NPROC_PER_NODE:-1}

# vllm_enable_lora sends the adapter alone instead of merged weights; its rank has to be one that vLLM knows (8, 16, 32, 64, ...).
# sleep_level 1 and the two offload options exchange the engine and the student on the GPU; drop them where both fit beside the teacher.
# vllm_enable_lora 只同步适配器，不合并权重；lora_rank 必须是 vLLM 支持的值（8、16、32、64……）。
# sleep_level 1 和两个 offload 参数让引擎与学生轮流占用显存；显存放得下两者和教师时可以去掉。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type lora \
    --lora_rank 8 \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_enable_lora true \
    --vllm_gpu_memory_utilization 0.4 \
    --vllm_max_model_len 2560 \
    --sleep_level 1 \
    --offload_model true \
    --offload_optimizer true \
    --lmbda 1 \
    --beta 1 \
    --temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --log_completions true \
    --output_dir "$OUTPUT" \
    "$@"
