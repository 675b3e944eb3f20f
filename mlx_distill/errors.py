"""The one error that commands turn into a sentence, and the sentence of others."""

SENTENCE = 600  # characters; names and values of others may be of any length
QUOTE = 300


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and why.

    Commands print the message on stderr and exit with status 2. Every other exception is ours and
    keeps its traceback. What others wrote may stand in it as it is: it is kept on one line, and of
    very long ones the middle is left out.
    """

    def __init__(self, message: str):
        super().__init__(shorten(printable(message), SENTENCE))


def not_numbers(where: str) -> InputError:
    """Return the error of logits that are NaN; ``where`` says after how much text."""
    return InputError(
        f"the model's logits are not numbers {where}; its weights are damaged, or its precision "
        "is too low"
    )


def one_line(error: BaseException) -> str:
    """Return an error's first line of text, or its name if it has none.

    A line that ends with a colon says nothing without the next.
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return shorten(said, QUOTE)


def printable(text: str) -> str:
    """Return a text on one line; what no terminal shows is written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, length: int) -> str:
    """Return a text of at most so many characters: its beginning and its end."""
    if len(text) <= length:
        return text
    tail = length // 4
    return f"{text[: length - tail - 5]} ... {text[-tail:]}"
