"""The task: find the one word of a list that belongs to a category, with the working written out, word by word.

    question:  find bird among salmon oak robin tulip trout ...
    answer:    oak tree no robin bird yes answer robin

The working tries words, says the category of each and whether it is the one. So a wrong first try can be noticed and mended, and that is
what the task is made for: whoever wrote the dataset's answers knew the word at once, so they hold no wrong try and nothing about what to
do after one. The teacher has seen wrong tries (one answer in ten of its training data) and knows how to go on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

WORDS = {
    'bird': 'robin crow eagle heron finch swan owl wren stork gull raven hawk lark swift dove',
    'fish': 'trout salmon tuna cod perch carp pike eel herring sole shark ray bream plaice smelt',
    'tree': 'oak birch elm ash pine maple cedar willow larch beech alder poplar spruce linden rowan',
    'flower': 'tulip rose lily daisy poppy iris aster violet lotus orchid peony pansy clover heather jasmine',
    'metal': 'iron copper zinc tin lead gold silver nickel cobalt chrome brass bronze steel titanium mercury',
    'tool': 'hammer saw chisel drill wrench pliers plane file axe rake spade hoe level clamp vise',
    'fruit': 'apple pear plum cherry grape fig melon mango lemon lime peach apricot quince papaya kiwi',
    'cloth': 'silk linen wool cotton denim velvet satin tweed felt lace flannel muslin canvas fleece jersey',
}
CATEGORY = {word: category for category, words in WORDS.items() for word in words.split()}
LIST_LENGTH = 8
KEYWORDS = ['find', 'among', 'yes', 'no', 'answer', 'user', 'assistant', 'system']


@dataclass(frozen=True)
class Problem:
    """``words`` has exactly one word of ``category``."""

    category: str
    words: tuple[str, ...]

    @property
    def solution(self) -> str:
        (solution,) = (word for word in self.words if CATEGORY[word] == self.category)
        return solution

    @property
    def question(self) -> str:
        return f'find {self.category} among {" ".join(self.words)}'

    def answer(self, wrong_tries: tuple[str, ...] = ()) -> str:
        tries = [f'{word} {CATEGORY[word]} no' for word in wrong_tries]
        return ' '.join([*tries, self.solution, self.category, 'yes', 'answer', self.solution])

    def is_solved_by(self, answer: str) -> bool:
        """Exact: the word after the first ``answer`` is the solution, and nothing follows it."""
        return answer.split('answer', 1)[-1].split() == [self.solution] and 'answer' in answer


def problems(seed: int) -> Iterator[Problem]:
    """Different problems without end; the same for the same seed."""
    draw, seen = random.Random(seed), set()
    while True:
        category = draw.choice(list(WORDS))
        others = draw.sample([word for word, its in CATEGORY.items() if its != category], LIST_LENGTH - 1)
        words = [*others, draw.choice(WORDS[category].split())]
        draw.shuffle(words)
        problem = Problem(category, tuple(words))
        if problem not in seen:
            seen.add(problem)
            yield problem


def row(problem: Problem, wrong_tries: tuple[str, ...] = ()) -> dict:
    """A row in ms-swift's format."""
    return {
        'messages': [{'role': 'user', 'content': problem.question}, {'role': 'assistant', 'content': problem.answer(wrong_tries)}],
    }


def teacher_row(problem: Problem, draw: random.Random) -> dict:
    """A row of the teacher's training data: in one of ten, some wrong tries come first."""
    wrong = [word for word in problem.words if word != problem.solution]
    return row(problem, tuple(draw.sample(wrong, draw.randint(1, len(wrong)))) if draw.random() < 0.1 else ())
