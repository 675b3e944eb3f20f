"""Measure drafting against mlx-lm on this machine, in one process, arms interleaved.

    python -m mlx_distill.benchmark --output results.json

Every prompt is decoded by every arm in turn: mlx-lm alone, mlx-lm with a draft model if one is
named, and drafting. The speed-up is the median over prompts of the ratio on the same prompt, so
that a machine whose speed drifts does not decide. Nothing else should run meanwhile.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx import nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mlx_distill import cli, machine
from mlx_distill.checkpoint import bundled
from mlx_distill.config import add_flags, check_seed, from_flags
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import read_prompts
from mlx_distill.distillation.loss_memory import loss_memory
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.errors import InputError
from mlx_distill.speculation.generation import stream_generate
from mlx_distill.speculation.timing import CycleClock, TimedDrafter
from mlx_distill.target.target import Target

PROMPTS = Path(__file__).parent / "data" / "story_openings.jsonl"
SHARING_SHAPES = ((5, 4), (10, 4), (15, 5), (25, 5), (35, 5), (45, 5))
PLAIN, DRAFT_MODEL, OURS = "mlx-lm", "mlx-lm with draft model", "mlx_distill"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Args:
        num_prompts: Prompts that are decoded by every arm.
        prompt_tokens: Cut prompts to so many tokens.
        max_tokens: Longest answer, in tokens.
        seed: Of the draws above temperature 0; every prompt has its own.
        num_draft_tokens: Of the draft model, if one is named.
        timed_prompts: Prompts over which the parts of a cycle are timed.
        sweep_prompts: Prompts per cell of the sweep over beam widths and draft lengths; 0 leaves
            the sweep out.
        sweep_widths: Beam widths of the sweep.
        sweep_lengths: Draft lengths of the sweep.
    """

    num_prompts: int = 40
    prompt_tokens: int = 32
    max_tokens: int = 128
    seed: int = 0
    num_draft_tokens: int = 3
    timed_prompts: int = 20
    sweep_prompts: int = 0
    sweep_widths: tuple[int, ...] = (1, 2, 4, 8)
    sweep_lengths: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "num_draft_tokens", "timed_prompts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.sweep_prompts <= self.num_prompts:
            raise InputError(
                f"sweep_prompts must be between 0 and num_prompts {self.num_prompts}, "
                f"got {self.sweep_prompts}"
            )
        check_seed("seed", self.seed)
        for name in ("sweep_widths", "sweep_lengths"):
            if min(getattr(self, name), default=0) < 1:
                raise InputError(f"{name} must be at least 1, got {min(getattr(self, name))}")
        if self.max_tokens < 2:
            raise InputError(f"max_tokens must be at least 2, to time, got {self.max_tokens}")


@dataclass
class Sample:
    """One prompt decoded by one arm.

    Args:
        tokens: The answer.
        tokens_per_s: Speed after the first token.
        first_token_s: Time to the first token.
        tokens_per_call: Tokens per call of the target.
        peak_memory_bytes: Of the arrays, during this decoding; every arm's models are loaded.
        target_calls: Calls of the target after the prompt.
        beam_tokens: Tokens of the trees' paths without shared prefixes.
        verified_tokens: Tokens that were verified.
        acceptance_by_depth: Share of the calls that accepted at least 1, 2, ... drafted tokens.
    """

    tokens: list[int]
    tokens_per_s: float
    first_token_s: float
    tokens_per_call: float
    peak_memory_bytes: int
    target_calls: int
    beam_tokens: int = 0
    verified_tokens: int = 0
    acceptance_by_depth: tuple[float, ...] = ()


@dataclass
class Bench:
    """A pair, its prompts and what is asked of it.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        drafter: Drafts for it.
        draft_model: A second model for mlx-lm's own drafting, or None.
        sampling: How tokens are drawn.
        config: How much is measured.
    """

    model: nn.Module
    tokenizer: Any
    drafter: Drafter
    draft_model: nn.Module | None
    sampling: Sampling
    config: BenchmarkConfig

    def arms(self, plan: DraftPlan) -> dict[str, Callable[[list[int], int], Iterator[Any]]]:
        """Return what decodes a prompt, by name; each takes the prompt and a seed."""
        law, limit = self.sampling, self.config.max_tokens
        sampler = law.mlx_lm_sampler(Target.of(self.model).vocab_size)

        def plain(prompt: list[int], seed: int) -> Iterator[Any]:
            mx.random.seed(seed)
            return mlx_lm.stream_generate(
                self.model, self.tokenizer, prompt, limit, sampler=sampler
            )

        def with_draft_model(prompt: list[int], seed: int) -> Iterator[Any]:
            mx.random.seed(seed)
            return mlx_lm.stream_generate(
                self.model,
                self.tokenizer,
                prompt,
                limit,
                draft_model=self.draft_model,
                num_draft_tokens=self.config.num_draft_tokens,
                sampler=sampler,
            )

        def ours(prompt: list[int], seed: int) -> Iterator[Any]:
            return stream_generate(
                self.model,
                self.tokenizer,
                prompt,
                drafter=self.drafter,
                max_tokens=limit,
                seed=seed,
                plan=plan,
                **asdict(law),
            )

        arms = {PLAIN: plain, DRAFT_MODEL: with_draft_model, OURS: ours}
        return arms if self.draft_model is not None else {PLAIN: plain, OURS: ours}

    def run(
        self, prompts: Sequence[list[int]], plan: DraftPlan, title: str
    ) -> dict[str, list[Sample]]:
        """Return the samples of every arm, after a prompt that does not count."""
        arms = self.arms(plan)
        samples: dict[str, list[Sample]] = {name: [] for name in arms}
        for decode in arms.values():
            measure(decode, prompts[0], 0)
        names = list(arms)
        for number, prompt in enumerate(tqdm(prompts, desc=title, unit="prompt", leave=False)):
            names.append(names.pop(0))  # no arm always follows the same other
            for name in names:
                samples[name].append(measure(arms[name], prompt, self.config.seed + number))
        return samples


def measure(
    decode: Callable[[list[int], int], Iterator[Any]], prompt: list[int], seed: int
) -> Sample:
    """Decode a prompt once."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    tokens: list[int] = []
    start = time.perf_counter()
    first = last = None
    own = 0
    for last in decode(prompt, seed):
        first = first or time.perf_counter()
        tokens.append(last.token)
        own += not last.from_draft
    end = time.perf_counter()
    if first is None or last is None:
        raise InputError("nothing was written, so there is nothing to measure")
    # Of mlx-lm: every token that was not drafted took a call, the first one that of the prefill.
    calls = getattr(last, "target_calls", own - 1)
    return Sample(
        tokens=tokens,
        tokens_per_s=(len(tokens) - 1) / max(end - first, 1e-9),
        first_token_s=first - start,
        tokens_per_call=len(tokens) / max(calls, 1),
        peak_memory_bytes=mx.get_peak_memory(),
        target_calls=max(calls, 1),
        beam_tokens=getattr(last, "beam_tokens", 0),
        verified_tokens=getattr(last, "verified_tokens", 0),
        acceptance_by_depth=getattr(last, "acceptance_by_depth", ()),
    )


def summary(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """Return a row per arm: medians, quartiles, and the speed-up prompt by prompt."""
    rows = []
    timed = [all(len(s.tokens) > 1 for s in row) for row in zip(*samples.values(), strict=True)]
    if not any(timed):
        raise InputError("every answer ended with its first token, so there is no speed to measure")
    for name, whole in samples.items():
        mine, plain = (list(compress(part, timed)) for part in (whole, samples[PLAIN]))
        pairs = zip(mine, plain, strict=True)
        ratios = [sample.tokens_per_s / other.tokens_per_s for sample, other in pairs]
        rows.append(
            {
                "arm": name,
                "prompts": len(mine),
                "tokens_per_s": spread([sample.tokens_per_s for sample in mine]),
                "speedup": spread(ratios),
                "tokens_per_call": statistics.mean(s.tokens_per_call for s in mine),
                "first_token_s": spread([sample.first_token_s for sample in mine]),
                "peak_memory_bytes": max(sample.peak_memory_bytes for sample in mine),
            }
        )
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of some values."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high}


def overhead(bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan) -> dict[str, float]:
    """Return where a cycle's time goes, in milliseconds, and the overhead's share of a plain step.

    Every prompt is decoded by mlx-lm alone and then by drafting with a clock at its two calls; the
    overhead is all that whole texts take beyond them. Medians over the prompts.
    """
    clock = CycleClock()
    plain = bench.arms(plan)[PLAIN]
    ours = replace(bench, drafter=TimedDrafter(bench.drafter, clock)).arms(plan)[OURS]
    rows = []
    for number, prompt in enumerate(tqdm(prompts, desc="cycles", unit="prompt", leave=False)):
        seed = bench.config.seed + number
        step_ms = 1e3 / max(measure(plain, prompt, seed).tokens_per_s, 1e-9)
        with clock.watching(Target.of(bench.model)):
            steps = ours(prompt, seed)
            next(steps)
            clock.reset()
            start = time.perf_counter()
            for _ in steps:
                pass
            whole_s = time.perf_counter() - start
        if clock.cycles == 0:
            continue  # the first token was the last one
        parts_s = (whole_s, clock.target_s, clock.drafter_s)
        whole_ms, target_ms, draft_ms = (1e3 * part / clock.cycles for part in parts_s)
        overhead_ms = whole_ms - target_ms - draft_ms
        rows.append(
            {
                "plain_step_ms": step_ms,
                "cycle_ms": whole_ms,
                "verify_ms": target_ms,
                "draft_ms": draft_ms,
                "overhead_ms": overhead_ms,
                "overhead_share_of_step": overhead_ms / step_ms,
            }
        )
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def sharing(bench: Bench, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Return the share of tokens that shared prefixes save, for beams of several shapes.

    The lengths count the certain token, as the published ones do.
    """
    rows = []
    for width, length in SHARING_SHAPES:
        plan = DraftPlan(beam_width=width, draft_length=length - 1, tree="beam")
        decode = bench.arms(plan)[OURS]
        samples = [measure(decode, prompt, bench.config.seed) for prompt in prompts]
        verified = sum(sample.verified_tokens for sample in samples)
        rows.append(
            {
                "beam_width": width,
                "beam_length": length,
                "beam_tokens": width * length,
                "saved_share": 1 - verified / sum(sample.beam_tokens for sample in samples),
                "tokens_per_call": statistics.mean(s.tokens_per_call for s in samples),
            }
        )
    return rows


def long_run(
    bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan, num_tokens: int
) -> list[dict[str, int]]:
    """Return the memory after every thousand tokens written by one process.

    Resident memory is the process's peak so far; array memory is the peak within the thousand.
    """
    decode = bench.arms(plan)[OURS]
    rows: list[dict[str, int]] = []
    written = 0
    mx.reset_peak_memory()
    with tqdm(total=num_tokens, desc="long run", unit="token", leave=False) as bar:
        while written < num_tokens:
            for _ in decode(prompts[written % len(prompts)], written):
                written += 1
                bar.update()
                if written % 1000 == 0 or written == num_tokens:
                    rows.append(
                        {
                            "tokens": written,
                            "resident_bytes": machine.peak_resident_bytes(),
                            "array_bytes": mx.get_peak_memory(),
                        }
                    )
                    mx.reset_peak_memory()
    return rows


def sweep(bench: Bench, prompts: Sequence[list[int]], plan: DraftPlan) -> list[dict[str, Any]]:
    """Return speed-up and tokens per call for every beam width and draft length."""
    rows = []
    for width in bench.config.sweep_widths:
        for length in bench.config.sweep_lengths:
            shape = replace(plan, beam_width=width, draft_length=length)
            found = summary(bench.run(prompts, shape, f"beams {width} x {length}"))[-1]
            rows.append(
                {
                    "beam_width": width,
                    "draft_length": length,
                    "speedup": found["speedup"],
                    "tokens_per_call": found["tokens_per_call"],
                }
            )
    return rows


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the speed-up over beam width and draft length as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for width in sorted({row["beam_width"] for row in rows}):
        mine = [row for row in rows if row["beam_width"] == width]
        lengths = [row["draft_length"] for row in mine]
        medians = [row["speedup"]["median"] for row in mine]
        axes.plot(lengths, medians, marker="o", label=f"beam width {width}")
        axes.fill_between(
            lengths,
            [row["speedup"]["quartile_1"] for row in mine],
            [row["speedup"]["quartile_3"] for row in mine],
            alpha=0.15,
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(title=title, xlabel="draft length, tokens", ylabel="speed-up over mlx-lm")
    axes.set_xticks(sorted({row["draft_length"] for row in rows}))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; return the exit status."""
    arguments = _parser().parse_args(argv)
    config = from_flags(BenchmarkConfig, arguments)
    plan = from_flags(DraftPlan, arguments)
    sampling = from_flags(Sampling, arguments)
    for path in (arguments.output, arguments.plot):
        if path and Path(path).exists():
            raise InputError(f"the output {path} exists; name another, or remove it")
        if path and not Path(path).parent.is_dir():
            raise InputError(f"the output {path} cannot be written: its folder does not exist")
    if arguments.long_run is not None and arguments.long_run < 1:
        raise InputError(f"long_run must be at least 1, got {arguments.long_run}")
    if arguments.plot and Path(arguments.plot).suffix != ".png":
        raise InputError(f"--plot writes a PNG; end its name with .png, got {arguments.plot}")
    if arguments.plot and not config.sweep_prompts:
        raise InputError("--plot draws the sweep; ask for one with --sweep-prompts")
    if arguments.loss_memory:
        return _loss_memory(arguments)
    model, tokenizer = cli.load_model(arguments)
    path = arguments.drafter or (None if arguments.model else bundled("stories-14m-redrafter"))
    if path is None:
        raise InputError("a model of your own needs a drafter; name one with --drafter")
    drafter = load_drafter(path, model, tokenizer)
    draft_model = cli.load_draft_model(arguments, tokenizer)
    for one in (model, draft_model) if draft_model is not None else ():
        if not can_trim_prompt_cache(make_prompt_cache(one)):
            raise InputError("mlx-lm's own drafting needs caches that can be trimmed")
    prompts = read_prompts(
        arguments.data or PROMPTS,
        tokenizer,
        prompt_tokens=config.prompt_tokens,
        chat_template=not arguments.ignore_chat_template,
    )
    if len(prompts) < config.num_prompts:
        raise InputError(f"{config.num_prompts} prompts were asked for, there are {len(prompts)}")
    prompts = prompts[: config.num_prompts]
    sampling.check_vocabulary(Target.of(model).vocab_size)
    bench = Bench(model, tokenizer, drafter, draft_model, sampling, config)
    samples = bench.run(prompts, plan, "benchmark")
    result: dict[str, Any] = {
        "arms": summary(samples),
        "equal_texts": equal_texts(samples) if sampling.temperature == 0 else None,
        "acceptance_by_depth": _mean_by_depth(samples[OURS]),
        "overhead": overhead(bench, prompts[: config.timed_prompts], plan),
        "config": cli.settings(arguments),
        "dtype": _dtype(model),
        **machine.provenance(),
    }
    if arguments.sharing:
        result["sharing"] = sharing(bench, prompts[:4])
    if arguments.long_run:
        result["long_run"] = long_run(bench, prompts, plan, arguments.long_run)
    if config.sweep_prompts:
        result["sweep"] = sweep(bench, prompts[: config.sweep_prompts], plan)
    show(result)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        title = f"{result['machine']['processor']}, temperature {sampling.temperature:g}"
        plot(result["sweep"], title, Path(arguments.plot))
    return 0


def _loss_memory(arguments: argparse.Namespace) -> int:
    """Measure a loss over a vocabulary, and nothing else."""
    num_tokens, num_entries = arguments.loss_memory
    if min(num_tokens, num_entries) < 1:
        raise InputError(f"loss_memory must be at least 1, got {min(num_tokens, num_entries)}")
    found = loss_memory(num_tokens, num_entries)
    print(
        f"KL over {num_tokens:,} tokens x {num_entries:,} entries with its gradients: "
        f"{found['whole_bytes'] / 1e6:.0f} MB at once, {found['chunked_bytes'] / 1e6:.0f} MB in "
        f"chunks ({found['share']:.0%}); gradients differ by {found['gradient_difference']:.0e}"
    )
    if arguments.output:
        known = machine.provenance()
        Path(arguments.output).write_text(json.dumps(found | known, indent=1) + "\n")
    return 0


def equal_texts(samples: dict[str, list[Sample]]) -> int:
    """Return on how many prompts drafting wrote exactly mlx-lm's tokens."""
    pairs = zip(samples[PLAIN], samples[OURS], strict=True)
    return sum(plain.tokens == ours.tokens for plain, ours in pairs)


def show(result: dict[str, Any]) -> None:
    """Print a benchmark's tables."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)  # a pipe has no width of its own
    found = result["machine"]
    table = Table(title=f"{found['processor']}, {result['dtype']}", title_justify="left")
    for name in ("arm", "tokens/s", "speed-up", "tokens/call", "first token", "peak memory"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in result["arms"]:
        table.add_row(
            row["arm"],
            _range(row["tokens_per_s"], ".0f"),
            _range(row["speedup"], ".2f"),
            f"{row['tokens_per_call']:.2f}",
            f"{1e3 * row['first_token_s']['median']:.0f} ms",
            f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
        )
    console.print(table)
    console.print(f"Medians over {result['arms'][0]['prompts']} prompts, quartiles in brackets.")
    if result["equal_texts"] is not None:
        prompts = result["config"]["num_prompts"]
        console.print(f"Tokens equal mlx-lm's on {result['equal_texts']} of {prompts} prompts.")
    depths = " ".join(f"{share:.2f}" for share in result["acceptance_by_depth"])
    console.print(f"Acceptance by depth: {depths}")
    cost = result["overhead"]
    console.print(
        f"A cycle takes {cost['cycle_ms']:.2f} ms: target {cost['verify_ms']:.2f}, drafter "
        f"{cost['draft_ms']:.2f}, overhead {cost['overhead_ms']:.2f} "
        f"({cost['overhead_share_of_step']:.0%} of a plain step of {cost['plain_step_ms']:.2f})."
    )
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


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.benchmark",
        description="Measure drafting against mlx-lm on this machine.",
    )
    cli.add_model_flags(parser)
    parser.add_argument("--drafter", type=cli.path, help="the drafter's folder or hub repository")
    parser.add_argument(
        "--draft-model", type=cli.path, help="a small model for mlx-lm's own drafting, as an arm"
    )
    parser.add_argument(
        "--data", help="JSONL of held-out prompts (default: 48 story openings of our own)"
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="use prompts as they are"
    )
    add_flags(parser, BenchmarkConfig)
    add_flags(parser, Sampling, {"temperature": "temp"})
    add_flags(parser, DraftPlan)
    parser.add_argument(
        "--sharing", action="store_true", help="also measure what shared prefixes save"
    )
    parser.add_argument(
        "--long-run", type=int, metavar="TOKENS", help="also write so many tokens, for the memory"
    )
    parser.add_argument(
        "--loss-memory",
        type=int,
        nargs=2,
        metavar=("TOKENS", "ENTRIES"),
        help="measure only the memory of a distillation loss over so large a vocabulary",
    )
    parser.add_argument("--output", help="write the results to this JSON file")
    parser.add_argument("--plot", help="draw the sweep to this PNG file")
    return parser


def _mean_by_depth(samples: Sequence[Sample]) -> list[float]:
    depth = max(len(sample.acceptance_by_depth) for sample in samples)
    padded = [[*s.acceptance_by_depth, *[0.0] * depth][:depth] for s in samples]
    return [statistics.mean(column) for column in zip(*padded, strict=True)]


def _range(values: dict[str, float], form: str) -> str:
    low, high = values["quartile_1"], values["quartile_3"]
    return f"{values['median']:{form}} ({low:{form}}-{high:{form}})"


def _dtype(model: nn.Module) -> str:
    """Return the type of a model's activations."""
    embed = Target.of(model).embed
    assert embed is not None
    return str(embed(mx.array([0])).dtype).rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main())
