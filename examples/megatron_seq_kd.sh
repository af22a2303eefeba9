#!/usr/bin/env bash
# Sequence-level distillation with megatron-core: the teacher answers every prompt, and the student learns its whole distribution at each
# token of the answer. The teacher generates in the training processes, in the layout that it has, with a KV cache and without vLLM. What
# it answers is kept and can be trained on again without it. The dataset needs prompts only.
#
# 用 megatron-core 做序列级蒸馏：每条提示由教师作答，学生在回答的每个 token 上学习教师的整个分布。教师在训练进程里、按自己的布局生成，
# 使用 KV 缓存，不需要 vLLM。教师的回答会保存下来，之后没有教师也可以再用来训练。数据集只需要提示。
#
# With vLLM beside the training processes for the answers / 由训练进程旁边的 vLLM 作答：
#   examples/megatron_seq_kd.sh --gkd_teacher_engine vllm --gkd_teacher_engine_args '--tensor-parallel-size 2 --gpu-memory-utilization 0.4'
#
# On 4 GPUs / 4 张 GPU：NPROC_PER_NODE=4 examples/megatron_seq_kd.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-14B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-megatron_output/seq_kd}

# beta 0 is KL(teacher || student). The teacher samples at a temperature of its own; 0 would be greedy.
# --steps_per_generation 4 has the prompts of four steps answered together: the more at a time, the less each token costs.
# beta 0 即 KL(教师‖学生)。教师采样用单独的温度；0 表示贪心解码。--steps_per_generation 4 让四步的提示一起作答：一次越多，每个 token 越便宜。
megatron rlhf \
    --rlhf_type gkd \
    --model "$MODEL" \
    --teacher_model "$TEACHER" \
    --dataset "$DATASET" \
    --torch_dtype bfloat16 \
    --lmbda 0 \
    --seq_kd true \
    --beta 0 \
    --temperature 1 \
    --gkd_teacher_temperature 0.7 \
    --max_completion_length 512 \
    --steps_per_generation 4 \
    --gkd_save_teacher_responses "$OUTPUT/answers.jsonl" \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 4 \
    --global_batch_size 16 \
    --num_train_epochs 1 \
    --lr 1e-5 \
    --max_length 2048 \
    --output_dir "$OUTPUT" \
    "$@"
