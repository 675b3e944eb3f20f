"""Answers to questions, as texts: what of a text is the answer, and how near it comes."""

import re
import string
from collections import Counter
from collections.abc import Sequence

THOUGHT = ("<think>", "</think>")


def spoken(text: str, thought: tuple[str, str] = THOUGHT) -> str | None:
    """Return what of a text stands behind leading blanks and thoughts.

    Args:
        text: What was written so far.
        thought: The marks around a thought.

    Returns:
        None while a thought has not ended.
    """
    begins, ends = thought
    text = text.lstrip()
    while text.startswith(begins):
        _, ended, text = text.partition(ends)
        if not ended:
            return None
        text = text.lstrip()
    return text


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if a normalised answer is one of the references, else 0."""
    return float(any(normalised(answer) == normalised(one) for one in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of an answer's words; the best reference's.

    Source:
        Rajpurkar et al. 2016 (SQuAD), arXiv:1606.05250, section 6.1; where nothing is left of one
        of the two, as in version 2.0: 1 if nothing is left of both, else 0.
    """
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in references)


def normalised(answer: str) -> str:
    """Return an answer in lower case, without punctuation, articles and superfluous spaces."""
    letters = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))
