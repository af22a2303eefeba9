"""Teacher and student: trained on right answers by plain torch until they give them so often, and no better; how good a model is."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import sorting
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'examples' / 'quickstart'))
import models

BATCH = 64
LEARNING_RATE = 1e-3
WRONG = 0.1  # share of the letters before a letter to be learnt: on the student's answers a teacher that has seen only right ones is lost
LOOK_EVERY = 5  # updates
LOOK_AT = 256  # problems


class Sorter:
    """A model with its tokenizer. All prompts have one length in tokens, and so have all right answers: nothing is ever padded."""

    def __init__(self, path: Path):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # an answer that ends early is wrong, and what follows changes nothing
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def prompts(self, problems: list[str]) -> torch.Tensor:
        """Token ids (problems, tokens)."""
        chats = [[{'role': 'user', 'content': sorting.question(letters)}] for letters in problems]
        return self._ids(self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))

    def answers(self, problems: list[str]) -> torch.Tensor:
        """Token ids (problems, letters + 1) of the right answers, with the token that ends them."""
        return self._ids([f'{sorting.solution(letters)} {self.tokenizer.eos_token}' for letters in problems])

    def _ids(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor(self.tokenizer(texts, add_special_tokens=False)['input_ids'])

    @torch.no_grad()
    def accuracy(self, problems: list[str], *, greedy: bool = False) -> float:
        """Share of the problems that are solved; sampled at temperature 1 unless greedy."""
        right = self.answers(problems)
        how = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        given = self.model.generate(self.prompts(problems), max_new_tokens=right.shape[1], **how)[:, -right.shape[1] :]
        return (given == right).all(-1).float().mean().item()

    def loss(self, problems: list[str]) -> torch.Tensor:
        """Cross-entropy of the right answers, in nats per token, behind letters of which WRONG are wrong."""
        prompts, answers = self.prompts(problems), self.answers(problems)
        letters = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(sorting.LETTERS)))
        behind = torch.where(torch.rand(answers.shape) < WRONG, letters[torch.randint(len(letters), answers.shape)], answers)
        logits = self.model(torch.cat([prompts, behind], 1)[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())


def pretrain(directory: Path, shape: dict, seed: int, until: float, at_most: int) -> int:
    """Write a model that has just become so good.

    Args:
        shape: Of the model, as ``models.make`` takes it.
        seed: Of its weights, its problems and its samples.
        until: Share of problems that it is to solve, sampled at temperature 1.
        at_most: Updates.

    Returns:
        Updates that it took.
    """
    new = directory.with_name(f'{directory.name}.new')
    models.make(new, seed=seed, vocabulary=sorting.VOCABULARY, **shape)
    sorter, problems = Sorter(new), sorting.problems(seed)
    looked_at = list(islice(problems, LOOK_AT))
    optimizer = torch.optim.AdamW(sorter.model.parameters(), lr=LEARNING_RATE)
    for update in range(1, at_most + 1):
        loss = sorter.loss(list(islice(problems, BATCH)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sorter.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update % LOOK_EVERY == 0 and (accuracy := sorter.accuracy(looked_at)) >= until:
            break
        if update % 100 == 0:
            print(f'{directory.name}: update {update}, loss {loss.item():.3f}, solves {accuracy:.1%}', flush=True)
    sorter.model.generation_config.eos_token_id = sorter.tokenizer.eos_token_id
    sorter.model.save_pretrained(new)
    new.rename(directory)
    return update
