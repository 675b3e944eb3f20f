"""Which texts that a model has written as its user would make good prompts, and why not.

A reason is the same for all texts of a kind, so that a report can count them. The language of a
text is judged by its script alone: a model's users write in one, or in a few, and a turn that mixes
them, or that is nearly alone with its own, is noise of the drawing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

MIN_WORDS = 3
REPEATED_GRAM = 3  # words
MOST_REPEATED = 0.3  # of a text's runs of so many words
LONGEST_RUN = 12  # equal characters
ONE_SCRIPT = 0.9  # of a text's letters
RARE_SCRIPT = 0.05  # of all texts
OPENING_WORDS = 8  # two texts that begin with as many equal words are one
# Scripts that write no spaces, and about so many characters for a word.
_UNSPACED = {"CJK": 2, "HIRAGANA": 2, "KATAKANA": 2, "THAI": 4, "LAO": 4, "KHMER": 4, "MYANMAR": 4}
_JAPANESE = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # written together


def fault(text: str) -> str | None:
    """Return why a text is no prompt whatever the others are; None if it is one."""
    if any(unicodedata.category(letter) in ("Cc", "Cn", "Co") for letter in text if letter != "\n"):
        return "not text"
    if "\ufffd" in text:
        return "not text"
    if len(_words(text)) < MIN_WORDS:
        return f"shorter than {MIN_WORDS} words"
    scripts = _scripts(text)
    if not scripts or scripts.most_common(1)[0][1] < ONE_SCRIPT * scripts.total():
        return "in no one script"
    if _repeats(text):
        return "repeating itself"
    return None


def rare_scripts(texts: Sequence[str]) -> set[str]:
    """Return the scripts that hardly any of some texts are written in."""
    counts = Counter(map(script, texts))
    return {name for name, count in counts.items() if count < RARE_SCRIPT * len(texts)}


def script(text: str) -> str:
    """Return the script that most letters of a text belong to, in Unicode's words."""
    return _scripts(text).most_common(1)[0][0]


def key(text: str) -> tuple[str, ...]:
    """Return what a text has in common with those that count as the same."""
    return tuple(_words(text.casefold())[:OPENING_WORDS])


def _words(text: str) -> list[str]:
    """Return the words of a text; of scripts without spaces, pieces as long as words are."""
    words = []
    for word in re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*|\w", text):
        size = _UNSPACED.get(_script(word[0]), len(word)) if word[0].isalpha() else len(word)
        words += [word[start : start + size] for start in range(0, len(word), size)]
    return words


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].partition("-")[0]


def _scripts(text: str) -> Counter[str]:
    names = (_script(letter) for letter in text if letter.isalpha())
    return Counter(_JAPANESE.get(name, name) for name in names)


def _repeats(text: str) -> bool:
    if re.search(rf"(\S)\1{{{LONGEST_RUN - 1}}}", text):
        return True
    words = _words(text.casefold())
    grams = list(zip(*(words[start:] for start in range(REPEATED_GRAM)), strict=False))
    return len(grams) - len(set(grams)) > MOST_REPEATED * len(grams)
