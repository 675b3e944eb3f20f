"""A drafter judged: what its drafts are worth in every shape, what they cost, how large it is."""

import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mlx_distill.arrays import num_bytes, num_values
from mlx_distill.calibration.pair import Pair
from mlx_distill.core.sampling import Temperature
from mlx_distill.data.prompts import read_asked
from mlx_distill.data.report import Report
from mlx_distill.data.selection import rows_in_turn
from mlx_distill.data.sources import check_sources
from mlx_distill.distillation.answer_files import WrittenAnswers, read_answers
from mlx_distill.distillation.answer_writing import origin
from mlx_distill.distillation.responses import (
    Response,
    ResponseConfig,
    answer,
    rows_with_room,
)
from mlx_distill.drafters.protocol import Drafter, DraftPlan, has_static_tree
from mlx_distill.drafters.registry import TrainedDrafter
from mlx_distill.errors import InputError
from mlx_distill.evaluation.draft_costs import draft_costs
from mlx_distill.evaluation.drafts import judge_drafts
from mlx_distill.evaluation.known_texts import posterior_noise
from mlx_distill.files import usable_path
from mlx_distill.limits import Between, Seed, check_fields
from mlx_distill.target.context import position_limit


@dataclass(frozen=True)
class JudgingConfig:
    """How a drafter is judged.

    Args:
        temperatures: At which the target writes; 0 is greedy.
        chains: The longest chain, in drafted tokens; 0 leaves chains out.
        beams: Width and length of the beams. Of each length up to this one they are judged whole,
            and trees are made of the longest.
        nodes: Of the trees, in tokens that the target verifies in one call.
        answer_tokens: The longest answer that the target writes where there is none, in tokens.
        rounds: How often calls and drafts are timed; 0 leaves the costs out.
        judge_seed: Of the answers that the target draws.
    """

    temperatures: tuple[Temperature, ...] = (0.0, 1.0)
    chains: Annotated[int, Between(0, 64)] = 6
    beams: tuple[Annotated[int, Between(1, 256)], ...] = (4, 6)
    nodes: tuple[Annotated[int, Between(1, 1024)], ...] = tuple(range(3, 17))
    answer_tokens: Annotated[int, Between(2, 10**6)] = 128
    rounds: Annotated[int, Between(3, 1000, also=0)] = 7
    judge_seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.beams) != 2:
            raise InputError(f"beams are a width and a length, got {len(self.beams)} numbers")
        if not self.temperatures:
            raise InputError("temperatures must name at least one")
        if not self.plans:
            raise InputError("neither chains nor beams nor nodes: there is nothing to judge")

    @property
    def plans(self) -> dict[str, DraftPlan]:
        """The shapes by name."""
        width, length = self.beams
        chains = {f"chain of {n}": DraftPlan(1, n, n + 1) for n in range(1, self.chains + 1)}
        trees = {f"{n} nodes": DraftPlan(width, length, n) for n in self.nodes}
        beams = {
            f"beams {width}x{n}": DraftPlan(width, n, tree="beam") for n in range(1, length + 1)
        }
        return {**chains, **trees, **beams}

    @property
    def static_plans(self) -> dict[str, DraftPlan]:
        """The shapes of static trees by name, for drafters that have some."""
        width, length = self.beams
        return {f"{n} static nodes": DraftPlan(width, length, n, "static") for n in self.nodes}


@dataclass(frozen=True)
class Material:
    """What a drafter is judged on.

    Args:
        prompts: Token ids.
        kinds: Of each prompt.
        greedy: The target's answers at temperature 0; None if it has not written any.
    """

    prompts: list[list[int]]
    kinds: list[str]
    greedy: list[Response] | None = None
    _written: dict[float, list[Response]] = field(default_factory=dict)

    @classmethod
    def read(
        cls, data: str | Path, pair: Pair, count: int | None = None, **options: Any
    ) -> "Material":
        """Return the first rows of a file, kinds taking turns.

        Args:
            data: Answers of the target in an npz file, or prompts.
            pair: The target, whose answers or prompts these are.
            count: How many; None for all.
            options: How prompts are encoded; see ``read_asked``.

        Raises:
            InputError: If the file cannot be used.
        """
        if _holds_answers(data):
            return cls._of(read_answers(data), pair, count)
        report = Report(noun="prompts")
        asked = read_asked(data, pair.tokenizer, report=report, **options)
        asked = [asked[row] for row in rows_with_room(pair.model, [a.ids for a in asked], report)]
        if not asked:
            raise InputError(f"no prompt of {data} can be answered: {report.reasons()}")
        if report.dropped:
            print(*report.lines(), sep="\n", file=sys.stderr)
        kept = [asked[row] for row in rows_in_turn([one.kind for one in asked])[:count]]
        return cls([one.ids for one in kept], [one.kind or "" for one in kept])

    @classmethod
    def _of(cls, written: WrittenAnswers, pair: Pair, count: int | None) -> "Material":
        written.check(pair.target.vocab_size, origin(pair.model, pair.tokenizer))
        written = written.readable(position_limit(pair.model))
        if any(written.greedy):
            written = written.greedy_ones()
        kinds = written.kinds or [""] * len(written.responses)
        written = written.only(rows_in_turn(kinds)[:count])
        prompts = [one.prompt for one in written.responses]
        greedy = written.responses if all(written.greedy) else None
        return cls(prompts, written.kinds or [""] * len(prompts), greedy)

    def answers(self, pair: Pair, temperature: float, config: JudgingConfig) -> list[Response]:
        """Return the target's answers at a temperature; what it has to write it writes once."""
        if temperature == 0 and self.greedy is not None:
            return self.greedy
        if temperature not in self._written:
            self._written[temperature] = self._write(pair, temperature, config)
        return self._written[temperature]

    def _write(self, pair: Pair, temperature: float, config: JudgingConfig) -> list[Response]:
        asked = ResponseConfig(
            config.answer_tokens, (temperature,), response_seed=config.judge_seed
        )
        written = answer(pair.model, pair.tokenizer.eos_token_ids, self.prompts, 0, asked)
        pairs = zip(self.prompts, written, strict=True)
        return [Response(prompt, tokens) for prompt, tokens in pairs]


def check_material(data: str | Path, template_config: Mapping[str, Any] | None = None) -> None:
    """Raise InputError if a file holds neither answers nor prompts; costs next to nothing.

    Answers are token ids already, so no template is given further arguments for them.
    """
    if _holds_answers(data):
        read_answers(data)
        if template_config:
            raise InputError(
                "--chat-template-config says how prompts are read; answers are token ids already"
            )
    else:
        check_sources([data])


def _holds_answers(data: str | Path) -> bool:
    path = usable_path(data, "the data")
    return path.suffix == ".npz" or (path.is_file() and zipfile.is_zipfile(path))


def judge_drafter(
    pair: Pair, material: Material, config: JudgingConfig, quiet: bool = True
) -> dict[str, Any]:
    """Return what is to be known of a drafter.

    Args:
        pair: A target and its drafter.
        material: The prompts, and perhaps answers.
        config: How it is judged.
        quiet: Draw no progress bar.

    Raises:
        InputError: If the target cannot be drafted for.
    """
    pair.target.require_drafting()
    figures: dict[str, Any] = {}
    plans = config.plans | (config.static_plans if has_static_tree(pair.drafter) else {})
    for temperature in config.temperatures:
        answers = material.answers(pair, temperature, config)
        noise = posterior_noise(temperature, config.judge_seed) if temperature else None
        judged = judge_drafts(
            pair.drafter, pair.target, answers, plans, material.kinds, noise, quiet
        )
        if not judged.places:
            raise InputError("no answer has two tokens; there is nothing to judge")
        figures[f"{temperature:g}"] = judged.to_dict()
    width, length = config.beams
    plan = DraftPlan(width, length, 8)
    costs = draft_costs(pair, plan, config.rounds) if config.rounds else None
    return {"temperatures": figures, "costs": costs, "size": sizes(pair.drafter, pair)}


def sizes(drafter: Drafter, pair: Pair) -> dict[str, int | float]:
    """Return a drafter's parameters and bytes, and its target's."""
    network = drafter.network if isinstance(drafter, TrainedDrafter) else None
    arrays = network.parameters() if network else {}
    return {
        "parameters": num_values(arrays),
        "bytes": num_bytes(arrays),
        "target_bytes": num_bytes(pair.model.parameters()),
    }
