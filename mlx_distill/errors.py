"""The one error that commands turn into a sentence."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and why.

    Commands print the message on stderr and exit with status 2. Every other exception is ours and
    keeps its traceback.
    """
