"""The task: put letters into the order of the alphabet. An answer is right or wrong as a whole.

question:  sort h c a h k b
answer:    a b c h h k
"""

from __future__ import annotations

import random
from collections.abc import Iterator

LETTERS = 'abcdefghijklmnop'
LENGTH = 6
VOCABULARY = (*LETTERS, 'sort', 'user', 'assistant', 'system')


def problems(seed: int) -> Iterator[str]:
    """Letters to be sorted, different ones without end; the same for the same seed."""
    draw, seen = random.Random(seed), set()
    while True:
        letters = ''.join(draw.choices(LETTERS, k=LENGTH))
        if letters not in seen:
            seen.add(letters)
            yield letters


def question(letters: str) -> str:
    return f'sort {" ".join(letters)}'


def solution(letters: str) -> str:
    return ' '.join(sorted(letters))


def row(letters: str) -> dict:
    """In ms-swift's format, with the column that the reward function reads."""
    messages = [{'role': 'user', 'content': question(letters)}, {'role': 'assistant', 'content': solution(letters)}]
    return {'messages': messages, 'solution': solution(letters)}
