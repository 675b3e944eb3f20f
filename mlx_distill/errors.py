"""The one error that commands turn into a sentence, and the sentence of others."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and why.

    Commands print the message on stderr and exit with status 2. Every other exception is ours and
    keeps its traceback.
    """


def not_numbers(where: str) -> InputError:
    """Return the error of logits that are NaN; ``where`` says after how much text."""
    return InputError(
        f"the model's logits are not numbers {where}; its weights are damaged, or its precision "
        "is too low"
    )


def one_line(error: BaseException) -> str:
    """Return an error's first line of text, or its name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
