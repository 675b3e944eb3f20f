"""Where tables and texts are printed for people."""

import rich.console


class Console(rich.console.Console):
    """One of rich's that treats a closed pipe as ``print`` does, and does not end the command."""

    def on_broken_pipe(self) -> None:
        """Tell the caller that the reader has gone, as with ``| head``.

        Raises:
            BrokenPipeError: Always.
        """
        raise BrokenPipeError
