"""Which target a drafter was made for: it never runs silently on another one."""

from mlx_distill.data.tokens import check_tokenizer
from mlx_distill.errors import InputError
from mlx_distill.hashes import tokenizer_hash
from mlx_distill.target.target import Target

Fingerprint = dict[str, int | str]


def fingerprint(target: Target, tokenizer: object = None) -> Fingerprint:
    """Return what a drafter has to know its target by.

    Raises:
        InputError: If what is given as the tokenizer is none.
    """
    known: Fingerprint = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    if tokenizer is not None:
        check_tokenizer(tokenizer)
        known["tokenizer_hash"] = tokenizer_hash(tokenizer)
    return known


def check_fingerprint(made_for: Fingerprint, found: Fingerprint) -> None:
    """Raise InputError if a drafter's target differs from the one it meets.

    Models of one tokenizer may have vocabularies of different widths, padded for the hardware's
    sake: a drafter fits all of them.
    """
    for name, value in found.items():
        known = made_for.get(name)
        padded = name == "vocab_size" and "tokenizer_hash" in found and similar(known, value)
        if known != value and not padded:
            raise InputError(
                f"the drafter was made for another target: its {name.replace('_', ' ')} is "
                f"{known}, this model's is {value}"
            )


def similar(known: object, value: object) -> bool:
    """Return whether two vocabularies can be one with and without padding."""
    if type(known) is not int or type(value) is not int:
        return False
    return value <= 2 * known <= 4 * value
