#!/usr/bin/env bash
# The teacher answers with vLLM, on the training GPUs themselves: each rank has an engine beside it that is asleep while the student
# trains. With K log-probabilities per token it says as well what the teacher thinks of them, so that no other copy of the teacher is
# loaded.
#
# 教师用 vLLM 作答，与训练在同一批 GPU 上：每个进程旁边有一个引擎，学生训练时它在休眠。每个 token 取 K 个对数概率时，打分也由它完成，不再加载
# 另一份教师。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/teacher_engine.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
K=${K:-64}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/teacher_engine}
ENGINE=${ENGINE:---max-model-len 2560 --gpu-memory-utilization 0.4}  # as on the command line of `vllm serve` / 写法同 `vllm serve`

swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --gkd_teacher_engine vllm \
    --gkd_teacher_engine_args="$ENGINE" \
    --gkd_logits_topk "$K" \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --seq_kd true \
    --temperature 0.9 \
    --gkd_temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --logging_steps 5 \
    --output_dir "$OUTPUT" \
    "$@"
