#!/usr/bin/env bash
# On-policy distillation with vLLM on GPUs of its own: `swift rollout` serves the student, training sends it the new weights after each
# update. Start the server first, in another terminal or on another machine:
#
# 在线蒸馏，vLLM 独占 GPU：`swift rollout` 部署学生模型，训练每次更新后把新权重发给它。先在另一个终端或另一台机器上启动服务：
#
#   CUDA_VISIBLE_DEVICES=3 examples/vllm_server.sh rollout
#   CUDA_VISIBLE_DEVICES=0,1,2 NPROC_PER_NODE=3 examples/vllm_server.sh
#
# Anybody who reaches the server's port can overwrite its weights, so it listens on this machine only; across machines use a private
# network and set HOST to the address of the interface.
# 能访问该端口的人都可以改写权重，因此服务默认只监听本机；跨机器时请使用内网，并把 HOST 设为对应网卡的地址。
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/vllm_server}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}

if [[ ${1:-} == rollout ]]; then
    shift
    exec swift rollout --model "$MODEL" --torch_dtype bfloat16 --host "$HOST" --port "$PORT" --vllm_max_model_len 2560 "$@"
fi

# The engine's options belong to the server's command line.
# 引擎参数写在服务端的命令行里。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --tuner_type full \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --use_vllm true \
    --vllm_mode server \
    --vllm_server_host "$HOST" \
    --vllm_server_port "$PORT" \
    --lmbda 1 \
    --beta 1 \
    --temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-5 \
    --logging_steps 5 \
    --log_completions true \
    --output_dir "$OUTPUT" \
    "$@"
