"""Train a recurrent drafter for a model: the model writes, the drafter learns its distributions.

    python -m mlx_distill.train_drafter --model M --data prompts.jsonl --output DIR

First the model answers the prompts (in batches; the answers are kept beside the output and used
again), then the drafter is trained on them. A run that was stopped goes on with ``--resume``.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from mlx_distill import cli, machine
from mlx_distill.arrays import num_bytes, num_values, to_host
from mlx_distill.config import add_flags, check_seed, from_flags
from mlx_distill.data.batches import frequent_tokens, padded_batch, shuffled_rows
from mlx_distill.data.prompts import read_prompts
from mlx_distill.data.responses import (
    Response,
    ResponseConfig,
    open_responses,
    read_responses,
    write_responses,
)
from mlx_distill.distillation.drafter import (
    TargetView,
    acceptance_by_depth,
    drafter_loss,
    view_of_target,
)
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.drafters.recurrent_folder import save_drafter
from mlx_distill.drafters.registry import fingerprint, load_drafter
from mlx_distill.errors import InputError
from mlx_distill.files import read_jsonl, write_whole
from mlx_distill.hashes import weights_hash
from mlx_distill.target.target import Target
from mlx_distill.training.checkpoints import checkpoints, step_of
from mlx_distill.training.config import TrainingConfig
from mlx_distill.training.loop import train
from mlx_distill.training.runs import SETTINGS, check_output, check_settings, partial_folder


@dataclass(frozen=True)
class DrafterTraining:
    """Everything that decides what a training makes; kept with the result.

    Args:
        exit_dim: Width of the drafter's head; None is two thirds of the target's width.
        num_draft_layers: Residual blocks in the head.
        draft_vocab_size: Tokens that can be drafted, the most frequent in the answers; 0 is all,
            None is what fits the target: all up to 2,048, else 32,768 at the most.
        unroll: Drafted tokens per start.
        decay: The i-th drafted token weighs decay ** (i - 1) in the loss.
        batch_size: Answers per step.
        held_out: Answers that are never trained on, for the evaluation.
        seed: Of the first weights and the order of the answers.
        responses: How the target writes.
        training: How the network is trained.
    """

    exit_dim: int | None = None
    num_draft_layers: int = 1
    draft_vocab_size: int | None = None
    unroll: int = 5
    decay: float = 0.8
    batch_size: int = 16
    held_out: int = 64
    seed: int = 0
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for name in ("unroll", "batch_size", "held_out"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_seed("seed", self.seed)
        if not 0 < self.decay <= 1:
            raise InputError(f"decay must be above 0 and at most 1, got {self.decay}")

    def network(self, target: Target) -> RecurrentDrafterConfig:
        """Return the shape of the drafter for a target."""
        assert target.embed is not None
        embedding_size = target.embed(mx.array([0])).shape[-1]
        draft_vocab = self.draft_vocab_size
        if draft_vocab is None:
            draft_vocab = 0 if target.vocab_size <= 2048 else min(32768, target.vocab_size * 3 // 8)
        return RecurrentDrafterConfig(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            exit_dim=target.hidden_size * 2 // 3 if self.exit_dim is None else self.exit_dim,
            num_draft_layers=self.num_draft_layers,
            embedding_size=None if embedding_size == target.hidden_size else embedding_size,
            draft_vocab_size=None if draft_vocab in (0, target.vocab_size) else draft_vocab,
        )


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train a drafter as the arguments say; return the exit status."""
    arguments = _parser().parse_args(argv)
    config = from_flags(
        DrafterTraining,
        arguments,
        responses=from_flags(ResponseConfig, arguments),
        training=from_flags(TrainingConfig, arguments),
    )
    for name in ("max_prompts", "prompt_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    output = Path(arguments.output)
    work = partial_folder(output)
    check_output(output, arguments.resume)
    model, tokenizer = cli.load_model(arguments)
    target = Target.of(model)
    target.require_drafting()
    if not all(hasattr(part, "merge") for part in make_prompt_cache(model)):
        raise InputError("mlx-lm cannot write answers in batches with this model's kind of cache")
    known = fingerprint(target, tokenizer)
    settings = {
        "config": asdict(config),
        "target": known,
        "data": [Path(path).name for path in arguments.data],
        "max_prompts": arguments.max_prompts,
        "prompt_tokens": arguments.prompt_tokens,
        "start_from": arguments.start_from and Path(arguments.start_from).name,
    }
    if arguments.resume:
        check_settings(work / SETTINGS, settings)
    start = arguments.start_from and load_drafter(arguments.start_from, model, tokenizer).network
    prompts = [
        prompt
        for path in arguments.data
        for prompt in read_prompts(
            path,
            tokenizer,
            prompt_tokens=arguments.prompt_tokens,
            chat_template=not arguments.ignore_chat_template,
        )
    ][: arguments.max_prompts]
    if len(prompts) <= config.held_out:
        raise InputError(f"{len(prompts)} prompts are too few: {config.held_out} are held out")
    shape = config.network(target)
    if start and start.config != shape:
        raise InputError(
            f"the drafter to start from has another shape: {start.config}, not {shape}"
        )
    longest = max(map(len, prompts)) + config.responses.max_tokens
    if target.context is not None and longest > target.context:
        raise InputError(
            f"the longest prompt and answer have {longest} tokens, the model's context is "
            f"{target.context}; use a smaller --prompt-tokens or --max-tokens"
        )
    print(memory_estimate(target, config, longest + config.unroll), file=sys.stderr)
    responses_path = Path(arguments.responses or output.with_name(output.name + ".responses.jsonl"))
    writer = {**known, "weights_hash": weights_hash(model)}
    output.parent.mkdir(parents=True, exist_ok=True)
    open_responses(responses_path, prompts, config.responses, writer)
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / SETTINGS, json.dumps(settings, indent=1))
    responses = _responses(responses_path, model, tokenizer, prompts, config, writer)
    trainer = DrafterTrainer(target, responses, config, start or None)
    log = trainer.run(work, quiet=arguments.quiet)
    files = {
        "training.json": json.dumps({**settings, "log": log, **machine.provenance()}, indent=1),
        "README.md": _card(output.name, trainer, settings, log),
    }
    save_drafter(output, trainer.network, known, files)
    shutil.rmtree(work)
    print(f"the drafter is in {output}")
    return 0


class DrafterTrainer:
    """A target, its answers and the drafter that learns from them.

    Args:
        target: Writes the goals; never changes.
        responses: The target's answers; the last ``config.held_out`` are for evaluation.
        config: How to train.
        start: A drafter to start from, of the configuration's shape.
    """

    def __init__(
        self,
        target: Target,
        responses: list[Response],
        config: DrafterTraining,
        start: RecurrentDrafter | None = None,
    ):
        assert target.embed is not None
        self.target = target
        self.embed = target.embed
        self.config = config
        self.training = responses[: -config.held_out]
        self.held_out = responses[-config.held_out :]
        # Every batch has the same shape: the longest text, and room for the last start's draft.
        longest = max(len(r.prompt) + len(r.response) for r in responses)
        self.width = longest + config.unroll
        mx.random.seed(config.seed)
        shape = config.network(target)
        self.network = RecurrentDrafter(shape)
        if shape.draft_vocab_size:
            tokens = frequent_tokens(self.training, shape.draft_vocab_size, shape.vocab_size)
            self.network.token_ids = mx.array(tokens)
        if start is not None:
            self.network.update(start.parameters())
            self.network.set_dtype(mx.float32)
        mx.eval(self.network.parameters())

    def view(self, responses: Sequence[Response]) -> TargetView:
        """Return the target's view of some of its answers."""
        texts, prompts, lengths = padded_batch(responses, self.width)
        logits, hidden = self.target.read(texts)
        token_ids = self.network.get("token_ids")
        return view_of_target(logits, hidden, self.embed(texts), prompts, lengths, token_ids)

    def evaluate(self) -> dict[str, list[float]]:
        """Return the held-out acceptance of a drafted chain, by depth."""
        total, count = mx.zeros((2, self.config.unroll)), mx.zeros((self.config.unroll,))
        for start in range(0, len(self.held_out), self.config.batch_size):
            view = self.view(self.held_out[start : start + self.config.batch_size])
            sums, counts = acceptance_by_depth(self.network, view, self.config.unroll)
            total, count = total + sums, count + counts
            mx.eval(total, count)
        greedy, sampled = to_host(total / mx.maximum(count, 1))
        return {"acceptance_greedy": greedy, "acceptance_sampled": sampled}

    def run(self, folder: Path, quiet: bool = False) -> list[dict[str, Any]]:
        """Train, from the last checkpoint in ``folder`` if there is one; return the log."""
        config = self.config
        folder.mkdir(parents=True, exist_ok=True)
        log_path = folder / "log.jsonl"
        done = checkpoints(folder)
        step = step_of(done[-1]) if done else 0
        log = [row for row in _read_log(log_path) if row["step"] <= step]
        steps = train(
            self.network,
            lambda view: drafter_loss(self.network, view, config.unroll, config.decay),
            lambda step: self.view(
                [
                    self.training[row]
                    for row in shuffled_rows(
                        len(self.training), config.batch_size, step, config.seed
                    )
                ]
            ),
            self.evaluate,
            config.training,
            folder,
        )
        with tqdm(total=config.training.steps, initial=step, unit="step", disable=quiet) as bar:
            for progress in steps:
                bar.update()
                bar.set_description(f"loss {progress.loss:.3f}")
                if progress.evaluation:
                    log.append(
                        {"step": progress.step, "loss": progress.loss, **progress.evaluation}
                    )
                    write_whole(log_path, "".join(json.dumps(row) + "\n" for row in log))
                    by_depth = " ".join(f"{x:.2f}" for x in log[-1]["acceptance_greedy"])
                    bar.set_postfix_str(f"held-out acceptance {by_depth}")
        return log


def memory_estimate(target: Target, config: DrafterTraining, width: int) -> str:
    """Return what training needs in memory, in words, before anything is written.

    Args:
        target: Stays loaded.
        config: Says how large the drafter and the batches are.
        width: The longest text, in tokens.

    Raises:
        InputError: If that is more than the machine has.
    """
    shape = config.network(target)
    weights = num_bytes(target.model.parameters())
    network = num_bytes(RecurrentDrafter(shape).parameters())  # lazy: no array is made
    positions = config.batch_size * width
    vocab = shape.draft_vocab_size or shape.vocab_size
    # The target's logits, and the goals made of them; per unrolled step the drafter's logits and
    # probabilities, their difference and its gradient, and a few vectors of the state.
    view = positions * (2 * shape.vocab_size + 2 * vocab) * 4
    unrolled = positions * config.unroll * (4 * vocab + 8 * shape.hidden_size) * 4
    total = weights + 4 * network + view + unrolled
    text = (
        f"memory: about {total / 1e9:.1f} GB (target {weights / 1e9:.1f}, drafter and optimizer "
        f"{4 * network / 1e9:.2f}, a batch of {config.batch_size} x {width} tokens "
        f"{(view + unrolled) / 1e9:.1f})"
    )
    if total > machine.memory_bytes():
        raise InputError(
            f"{text}, but this machine has {machine.memory_bytes() / 1e9:.1f} GB; "
            "use a smaller --batch-size, --max-tokens or --draft-vocab-size"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m mlx_distill.train_drafter",
        description="Train a recurrent drafter for a model by distillation.",
    )
    cli.add_model_flags(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", help="JSONL files of prompts, messages, turns or text"
    )
    parser.add_argument("--output", required=True, help="the drafter's folder; must not exist")
    parser.add_argument(
        "--start-from", metavar="DRAFTER", help="start with the weights of this drafter's folder"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the unfinished training of this output"
    )
    parser.add_argument(
        "--responses", help="where the model's answers are kept (default: OUTPUT.responses.jsonl)"
    )
    parser.add_argument("--max-prompts", type=int, help="use the first so many prompts only")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        help="cut prompts to so many tokens (default: rows of text are cut to 32, prompts are not)",
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="use prompts as they are"
    )
    parser.add_argument("--quiet", action="store_true", help="draw no progress bar")
    for config in (DrafterTraining, ResponseConfig, TrainingConfig):
        add_flags(parser, config)
    return parser


def _responses(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    config: DrafterTraining,
    writer: dict[str, Any],
) -> list[Response]:
    """Let the target answer the prompts that it has not answered yet; return all the answers."""
    written = write_responses(
        path, model, tokenizer.eos_token_ids, prompts, config.responses, writer
    )
    with tqdm(total=len(prompts), unit="answer", desc="the target writes", leave=False) as bar:
        for count in written:
            bar.update(count - bar.n)
    return read_responses(path)[: len(prompts)]


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def _card(name: str, trainer: DrafterTrainer, settings: dict[str, Any], log: list[Any]) -> str:
    """Return the model card: what the drafter is, how it was made, what was measured."""
    shape = trainer.network.config
    parameters = num_values(trainer.network.parameters())
    start = f" It started from {settings['start_from']}." if settings["start_from"] else ""
    tokens = sum(len(response.response) for response in trainer.training)
    rows = "\n".join(
        f"| {depth} | {greedy:.3f} | {sampled:.3f} |"
        for depth, (greedy, sampled) in enumerate(
            zip(log[-1]["acceptance_greedy"], log[-1]["acceptance_sampled"], strict=True), start=1
        )
    )
    return f"""# {name}
A recurrent drafter of {parameters:,} parameters for one target: hidden size \
{shape.hidden_size}, {shape.vocab_size:,} tokens, tokenizer hash \
{settings["target"]["tokenizer_hash"]}. It drafts \
{shape.draft_vocab_size or shape.vocab_size:,} of the tokens. It is useless on its own, and it \
never changes what its target writes: the target verifies every token.

Trained with `python -m mlx_distill.train_drafter` on {len(trainer.training):,} answers \
({tokens:,} tokens) that the target wrote to prompts from `{", ".join(settings["data"])}`; \
{settings["config"]["training"]["steps"]:,} steps of {trainer.config.batch_size} answers; the \
settings and the log are in `training.json`.{start}

Acceptance of a drafted chain on {len(trainer.held_out)} held-out answers, by depth: how often the \
drafter's best token is the target's (greedy), and the target's probability of it (temperature 1).

| depth | greedy | temperature 1 |
|---|---|---|
{rows}

The licence is that of the target.
"""


if __name__ == "__main__":
    sys.exit(main())
