#!/usr/bin/env bash
# A teacher behind a server: the student answers half of the prompts, the teacher the other half, and the server says for each response
# token which K tokens it holds most likely. Start one of the servers first, on devices of its own:
#
# 教师在服务后面：一半提示由学生作答，另一半由教师作答；对每个回答 token，服务给出它认为最可能的 K 个 token。先在单独的设备上启动其中一种服务：
#
#   vllm serve Qwen/Qwen2.5-7B-Instruct --port 8000 --max-logprobs 64
#   swift deploy --model Qwen/Qwen2.5-7B-Instruct --infer_backend vllm --port 8000 --max_logprobs 64
#
# A key, if the server wants one, goes into the environment: export GKD_TEACHER_API_KEY=...
# 服务若需要密钥，放进环境变量：export GKD_TEACHER_API_KEY=...
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/teacher_server.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
SERVER=${SERVER:-http://127.0.0.1:8000}
K=${K:-64}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/teacher_server}

# What the teacher answers is kept and can be trained on again: --dataset answers.jsonl --lmbda 0 --seq_kd false
# 教师的回答会保留下来，可以再次用来训练：--dataset answers.jsonl --lmbda 0 --seq_kd false
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model_server "$SERVER" \
    --gkd_logits_topk "$K" \
    --gkd_save_teacher_responses "$OUTPUT/answers.jsonl" \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0.5 \
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
