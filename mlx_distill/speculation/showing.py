"""A text on a terminal while it is written, and what is told of it then."""

import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

from rich.console import Console
from rich.style import Style

from mlx_distill.benchmarking.comparison import Comparison
from mlx_distill.speculation.responses import GenerationResponse

DRAFTED, GIVEN = Style(color="green"), Style(dim=True)


@dataclass
class Run:
    """What was written: the text, its tokens, the last response, and whether Ctrl-C ended it."""

    text: str
    tokens: list[int]
    last: GenerationResponse | None
    interrupted: bool


def show(
    responses: Generator[GenerationResponse, None, None],
    console: Console,
    show_draft: bool,
    prompt: str = "",
) -> Run:
    """Print a text while it is written; Ctrl-C ends it.

    Args:
        responses: From ``stream_generate``.
        console: Where to; the text goes there as it is.
        show_draft: Colour the pieces that were drafted; plain where colours are not understood.
        prompt: What the text goes on with; shown before it, dimmed, where somebody looks at it.
    """
    if prompt and console.is_terminal:
        console.file.write(GIVEN.render(prompt))
    pieces, tokens, last, interrupted = [], [], None, False
    try:
        with closing(responses):
            for last in responses:
                pieces.append(last.text)
                tokens.append(last.token)
                colour = show_draft and last.from_draft and console.is_terminal
                console.file.write(DRAFTED.render(last.text) if colour else last.text)
                console.file.flush()
    except KeyboardInterrupt:
        interrupted = True
    console.file.write("\n")
    console.file.flush()
    return Run("".join(pieces), tokens, last, interrupted)


def print_statistics(
    last: GenerationResponse | None, drafting: bool, comparison: Comparison | None
) -> None:
    """Print the counters of a text on stderr, and what mlx-lm alone took."""
    if last is None:
        print("No text was written", file=sys.stderr)
        return
    lines = [
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tokens-per-sec",
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens-per-sec",
        f"Target calls: {last.target_calls}, tokens per call: {last.tokens_per_call:.2f}",
    ]
    if drafting and last.target_calls:
        depths = " ".join(f"{share:.2f}" for share in last.acceptance_by_depth)
        saved = 1 - last.verified_tokens / last.beam_tokens
        lines += [
            f"Drafted tokens: {last.drafted_tokens}, accepted: {last.accepted_tokens}",
            f"Acceptance by depth: {depths}",
            f"Verified tokens: {last.verified_tokens}; {last.beam_tokens} without shared prefixes, "
            f"{saved:.0%} saved",
        ]
    lines.append(f"Peak memory: {last.peak_memory:.3f} GB")
    if comparison:
        lines.append(
            f"mlx-lm alone: {comparison.generation_tps:.1f} tokens-per-sec; "
            f"drafting is {comparison.speedup:.2f} times as fast"
        )
        if comparison.margin is not None:
            lines.append(
                f"Tokens differ from mlx-lm's from token {comparison.first_difference} on, where "
                f"the best two were {comparison.margin:.4f} nats apart"
            )
    print("\n".join(lines), file=sys.stderr)
