"""A stand-in for vLLM: greedy ``generate`` of transformers, on the weights that the bridge exports, which is what vLLM would be sent."""

from __future__ import annotations

import copy

import torch
from swift.infer_engine.protocol import ChatCompletionResponse, ChatCompletionResponseChoice, ChatMessage, RolloutOutput, UsageInfo
from transformers import AutoConfig, AutoModelForCausalLM


def install(trainer: type) -> None:
    """Replace the two methods of ms-swift's rollout that need vLLM."""

    def _init_rollout_engine(self) -> None:
        self._init_rollout_params()
        self.vllm_mode, self.vllm_tensor_parallel_size, self.generated_on = 'colocate', 1, []
        config = AutoConfig.from_pretrained(self.args.model_dir)
        # Where a model of Megatron exists, the bridge's function computes the rotary embedding, and transformers 5 lacks what it reads.
        config.rope_theta = config.rope_parameters['rope_theta']
        self.engine = AutoModelForCausalLM.from_pretrained(self.args.model_dir, config=config, dtype=torch.float32)

    def _generate_completions(self, samples: list) -> list:
        samples = self._preprocess_inputs(samples)
        self.merge_lora_adapters()
        weights = {name: weight.clone() for name, weight in self.bridge.export_weights(self.unwrapped_models)}
        self.unmerge_lora_adapters()
        missing, unexpected = self.engine.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {'lm_head.weight'}, (missing, unexpected)
        self.generated_on.append(len(samples))
        outputs = []
        template = copy.copy(self.template)
        template.padding_free, template.use_megatron = False, False
        for sample in samples:
            with template.generate_context():
                ids = template.encode({'messages': sample.messages})['input_ids']
            new = self.engine.generate(
                torch.tensor([ids]), max_new_tokens=self.args.max_completion_length, do_sample=False, pad_token_id=0
            )[0, len(ids) :].tolist()
            choice = ChatCompletionResponseChoice(0, ChatMessage('assistant', template.safe_decode(new)), 'length', token_ids=new)
            outputs.append(RolloutOutput(response=ChatCompletionResponse('stand-in', [choice], UsageInfo(0, 0, 0))))
        return self._postprocess_rollout_outputs(samples, outputs)

    trainer._init_rollout_engine = _init_rollout_engine
    trainer._generate_completions = _generate_completions
