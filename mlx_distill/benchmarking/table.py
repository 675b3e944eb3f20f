"""A benchmark as tables and sentences."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mlx_distill.console import Console


def show(result: dict[str, Any]) -> None:
    """Print a benchmark's tables."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)  # a pipe has no width of its own
    found = result["machine"]
    table = Table(title=escape(f"{found['processor']}, {result['dtype']}"), title_justify="left")
    figures = "tokens/s", "speed-up", "tokens/call", "nodes/call", "first token", "peak memory"
    for name in ("arm", *figures):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in result["arms"]:
        table.add_row(
            row["arm"],
            _range(row["tokens_per_s"], ".0f"),
            _range(row["speedup"], ".2f"),
            f"{row['tokens_per_call']:.2f}",
            f"{row['nodes_per_call']:.1f}",
            f"{1e3 * row['first_token_s']['median']:.0f} ms",
            f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
        )
    console.print(table)
    console.print(
        f"Medians over {result['arms'][0]['prompts']} prompts, quartiles in brackets; tokens and "
        "nodes per call are means, and memory is the most that a prompt took."
    )
    _show_differences(console, result)
    depths = " ".join(f"{share:.2f}" for share in result["acceptance_by_depth"])
    console.print(f"Acceptance by depth: {depths}")
    cost = result["overhead"]
    console.print(
        f"A cycle takes {cost['cycle_ms']:.2f} ms: target {cost['verify_ms']:.2f}, drafter "
        f"{cost['draft_ms']:.2f}, overhead {cost['overhead_ms']:.2f} "
        f"({cost['overhead_share_of_step']:.0%} of a plain step of {cost['plain_step_ms']:.2f})."
    )
    _show_studies(console, result)


def _show_differences(console: Console, result: dict[str, Any]) -> None:
    """Say on how many prompts the greedy texts are equal, and where the others part."""
    if result["equal_texts"] is None:
        return
    prompts = result["config"]["num_prompts"]
    console.print(f"Tokens equal mlx-lm's on {result['equal_texts']} of {prompts} prompts.")
    if result["differences"]:
        widest = max(one["margin"] for one in result["differences"])
        console.print(
            f"Where the others part from it, its best two tokens are at most {widest:.4f} nats "
            "apart."
        )


def _show_studies(console: Console, result: dict[str, Any]) -> None:
    """Print what was measured beside the arms."""
    for row in result.get("sharing", ()):
        console.print(
            f"Beams {row['beam_width']} x {row['beam_length']}: {row['beam_tokens']} tokens, "
            f"{row['saved_share']:.0%} saved by shared prefixes, "
            f"{row['tokens_per_call']:.2f} tokens per call"
        )
    if "long_run" in result:
        first, last = result["long_run"][0], result["long_run"][-1]
        console.print(
            f"Peak memory: {first['resident_bytes'] / 1e6:.1f} MB after {first['tokens']:,} "
            f"tokens, {last['resident_bytes'] / 1e6:.1f} MB after {last['tokens']:,}"
        )
    for row in result.get("sweep", ()):
        console.print(
            f"Beam width {row['beam_width']}, draft length {row['draft_length']}: "
            f"{_range(row['speedup'], '.2f')}, {row['tokens_per_call']:.2f} tokens per call"
        )


def show_profile(result: dict[str, Any]) -> None:
    """Print where a cycle's time goes."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)
    limits, step = result["ceilings"], result["plain_step"]
    table = Table(title="A cycle, the device waited for around every part", title_justify="left")
    for name in ("part", "ms", "share", "waiting", "dispatches", "at least", "reached"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in result["parts"]:
        cells = (f"{row['ms']:.3f}", f"{row['share']:.0%}", f"{row['waiting_ms']:.3f}")
        table.add_row(row["part"], *cells, f"{row['dispatches']:.1f}", *_ceiling(row))
    whole = sum(row["dispatches"] for row in result["parts"])
    waiting = sum(row["waiting_ms"] for row in result["parts"])
    cells = (f"{result['waited_cycle_ms']:.3f}", "100%", f"{waiting:.3f}", f"{whole:.1f}")
    table.add_row("cycle", *cells, "", "")
    alone = (f"{step['ms']:.3f}", "", "", f"{step['dispatches']:.1f}")
    table.add_row("plain step of mlx-lm", *alone, *_ceiling(step))
    console.print(table)
    saved = result["waited_cycle_ms"] - result["cycle_ms"]
    console.print(
        f"Without that waiting a cycle takes {result['cycle_ms']:.3f} ms, {saved:.3f} less by "
        f"overlap; the loop's own thread works for {result['host_ms']:.3f} of it and is blocked "
        f"for the rest. A cycle adds {result['tokens_per_call']:.2f} tokens."
    )
    console.print(
        f"At least: {result['nodes']} nodes after {result['context']} tokens at what this machine "
        f"reaches in {limits['dtype']}, {limits['bytes_per_s'] / 1e9:.1f} GB/s and "
        f"{limits['flops_per_s'] / 1e9:.0f} GFLOP/s; bytes and operations are estimated, and "
        "weights that stay in the processor's own cache come faster."
    )


def _ceiling(row: dict[str, Any]) -> tuple[str, str]:
    """Return the least time that a part can take, and the share of the machine that it reaches."""
    if row["ceiling_ms"] is None or row["reached"] is None:
        return "", ""
    return f"{row['ceiling_ms']:.3f}", f"{row['reached']:.0%}"


def show_dispatches(result: dict[str, Any]) -> None:
    """Print how many operations a GPU would be sent."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)
    table = Table(title="Dispatches", title_justify="left")
    table.add_column("model")
    calls = [name for name in result["targets"][0] if name.startswith("target_call")]
    heads = [f"call of {name.rpartition('_')[2]}" for name in calls]
    for name in (
        "layers",
        "plain step",
        *heads,
        "of 8, kernels",
        "8 rows of mlx-lm",
        "moving commit",
    ):
        table.add_column(name, justify="right")
    for row in result["targets"]:
        counts = ["layers", "plain_step", *calls, "kernels_8", "mlx_lm_rows_8", "moving_commit"]
        table.add_row(escape(row["model"]), *(str(row[name]) for name in counts))
    console.print(table)
    for law, parts in result["cycles"].items():
        shown = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        console.print(f"The pair's cycle beside the target's call, {law}: {shown}")
    for law, parts in result["with_kernels"]["cycles"].items():
        shown = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        call = result["with_kernels"]["target_call"]
        console.print(f"With all kernels, {law}: target's call {call}, {shown}")


def _range(values: dict[str, float], form: str) -> str:
    low, high = values["quartile_1"], values["quartile_3"]
    return f"{values['median']:{form}} ({low:{form}}-{high:{form}})"


def show_samplers(num_rows: int, num_entries: int, times: Sequence[dict[str, Any]]) -> None:
    """Print how long draws take."""
    table = Table(
        title=f"Draws from {num_rows:,} rows of {num_entries:,} entries, ms", title_justify="left"
    )
    table.add_column("law")
    for head in ("mlx-lm", "sorted", "ours", "mlx-lm / ours", "noise"):
        table.add_column(head, justify="right")
    for row in times:
        cells = [f"{row[name]:.1f}" for name in ("mlx_lm_ms", "sorted_ms", "ours_ms", "noise_ms")]
        cells.insert(3, f"{row['mlx_lm_ms'] / row['ours_ms']:.1f}")
        table.add_row(", ".join(f"{k} {v:g}" for k, v in row["law"].items()), *cells)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)
    console.print(table)
    console.print(
        "mlx-lm's samplers make their noise themselves; ours are given it, because a text's is "
        "made once a token, and not once a node."
    )


def loss_sentence(num_tokens: int, num_entries: int, found: dict[str, Any]) -> str:
    """Return what was found of a loss over a vocabulary, in words."""
    return (
        f"KL over {num_tokens:,} tokens x {num_entries:,} entries with its gradients: "
        f"{found['whole_bytes'] / 1e6:.0f} MB at once, {found['chunked_bytes'] / 1e6:.0f} MB in "
        f"chunks ({found['share']:.0%}); gradients differ by {found['gradient_difference']:.0e}"
    )
