#!/usr/bin/env bash
# The student is its own teacher: of its eight answers to a prompt the best one that has passed is shown to its moving average, which then
# looks at the others token by token. No other model is loaded; rewards only say which answers have passed.
#
# 学生做自己的教师：对每条提示作答八次，把通过了的最好的回答给学生的移动平均看，由它逐个 token 地看其余的回答。
# 不加载其他模型；奖励只决定哪些回答算通过。
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/feedback.sh
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-output/feedback}

# A prompt with an example has to fit --max_length too. --gkd_feedback NAME of your own: docs_en/rewards.md, docs_zh/rewards.md.
# 带例子的提示也要放得进 --max_length。自己的 --gkd_feedback：见 docs_en/rewards.md、docs_zh/rewards.md。
swift rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --gkd_self_teacher ema \
    --tuner_type lora \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 1 \
    --gkd_num_samples 8 \
    --external_plugins "$HERE/reward.py" \
    --reward_funcs concise \
    --gkd_passing_reward 0.3 \
    --gkd_feedback sibling \
    --gkd_rl_weight 0 \
    --temperature 1 \
    --max_length 2048 \
    --max_completion_length 512 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 \
    --logging_steps 5 \
    --log_completions true \
    --output_dir "$OUTPUT" \
    "$@"
