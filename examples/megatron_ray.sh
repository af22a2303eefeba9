#!/usr/bin/env bash
# On-policy distillation over several machines, started by Ray: half of the samples are answered by the student, by vLLM on the GPUs of the
# training. Ray reads every option from a file, which this script writes.
#
# 多机在线蒸馏，由 Ray 启动：一半的样本由学生回答，由训练所用 GPU 上的 vLLM 生成。使用 Ray 时所有参数都来自一个文件，由本脚本写出。
#
# On 2 machines with 8 GPUs each, with the plugin installed on both / 两台各 8 张 GPU 的机器，都已安装插件：
#   ray start --head                        # on the first / 第一台
#   ray start --address=<first>:6379        # on the second / 第二台
#   examples/megatron_ray.sh                # on the first / 第一台
#
# On one machine Ray starts by itself / 只用一台机器时 Ray 会自己启动：NNODES=1 GPUS=8 examples/megatron_ray.sh
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATASET=${DATASET:-AI-ModelScope/alpaca-gpt4-data-en#2000}
OUTPUT=${OUTPUT:-megatron_output/ray}
MACHINES=${NNODES:-2}
GPUS=${GPUS:-16}
unset NNODES  # ms-swift would start torchrun / 否则 ms-swift 会启动 torchrun

mkdir -p "$OUTPUT"
cat > "$OUTPUT/ray.yaml" <<EOF
rlhf_type: gkd
model: $MODEL
teacher_model: $TEACHER
dataset: $DATASET
torch_dtype: bfloat16
lmbda: 0.5
max_completion_length: 512
temperature: 0.9
gkd_temperature: 1
micro_batch_size: 2
global_batch_size: 32
num_train_epochs: 1
lr: 1e-5
max_length: 2048
offload_teacher_model: true
nnodes: $MACHINES
colocate_groups: [[train, rollout]]
sleep_level: 1
train:
  gpus: $GPUS
  tensor_model_parallel_size: 2
  sequence_parallel: true
  output_dir: $OUTPUT
rollout:
  gpus: $GPUS
  vllm_gpu_memory_utilization: 0.4
EOF
megatron rlhf --use_ray true --config "$OUTPUT/ray.yaml"
