"""What a drafter is worth, by answers that its target has written already.

The text is known, so nothing has to be generated: the target reads every answer once, and drafts
are made behind every token of it, many at a time. A draft is worth the tokens of the text that it
has in a row, and the one more that every call brings:

    text   the cat sat on the mat        draft at "cat": sat - on - a
    two of three are the text's; the next draft is made at "the", three tokens on

That is what decoding does at temperature 0, call by call. Above it, a text depends on its random
numbers as well, and drafts are made in sight of them. Let y be a text that the target drew and g
the noise that it was drawn with. The calls c(y, g) that decoding takes are then known just so, and

    tokens per call = E[|y|] / E[c(y, g)],   y ~ p,  g ~ p(g | y)

needs nothing but texts of the target and noise from its law given the text (``posterior_noise``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from mlx_distill.distillation.responses import Response
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.evaluation.known_texts import Noise, known_texts
from mlx_distill.evaluation.met import NOWHERE, Met
from mlx_distill.target.target import Target

CHOICES = 8  # of the drafter, among which the next token may be
ALL_CHOICES = DraftPlan(CHOICES, 1)
SIZES = ("draft_length", "nodes")
ALL, TOLD_APART = "all", " (class)"


def class_name(kind: str) -> str:
    """Return the name of a class of prompts beside "all", all classes together.

    A class that is itself called so is told apart; "" is all.
    """
    called_all = kind.replace(TOLD_APART, "") == ALL
    return kind + TOLD_APART if called_all else kind or ALL


@dataclass
class Worth:
    """What drafts were worth.

    Args:
        calls: Of the target.
        tokens: That the calls brought.
        nodes: That they verified.
        reached: How many drafts had one, two, ... tokens of the text in a row.
    """

    calls: int = 0
    tokens: int = 0
    nodes: int = 0
    reached: list[int] = field(default_factory=list)

    @property
    def tokens_per_call(self) -> float:
        """What a call brought on average."""
        return self.tokens / max(1, self.calls)

    def walk(self, accepted: Int[np.ndarray, " S"], nodes: Int[np.ndarray, " S"]) -> None:
        """Count the calls of a text, of which a draft is known at every place."""
        place = 0
        while place < len(accepted):
            found = int(accepted[place])
            self.calls += 1
            self.nodes += int(nodes[place])
            self.tokens += min(found + 1, len(accepted) - place)
            self.reached += [0] * (found - len(self.reached))
            for depth in range(found):
                self.reached[depth] += 1
            place += found + 1

    def to_dict(self) -> dict[str, float | int | list[float]]:
        """Return the figures; acceptance is the share of drafts that reached a depth."""
        calls = max(1, self.calls)
        return {
            "tokens_per_call": self.tokens_per_call,
            "nodes_per_call": self.nodes / calls,
            "calls": self.calls,
            "tokens": self.tokens,
            "reached": [count / calls for count in self.reached],
        }


@dataclass
class Judged:
    """What was found of a drafter.

    Args:
        worth: By the name of a shape and the kind of prompt; "" is all.
        choices: How often the next token was the drafter's first, second, ... choice.
        places: How many drafts were made.
        tokens: How many tokens the answers have.
        agreed: How many of them are the target's best.
    """

    worth: dict[str, dict[str, Worth]]
    choices: Int[np.ndarray, " K"] = field(default_factory=lambda: np.zeros(CHOICES, np.int64))
    places: int = 0
    tokens: int = 0
    agreed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the figures, of kinds of prompts by ``class_name``."""
        return {
            "shapes": {
                name: {class_name(kind): worth.to_dict() for kind, worth in kinds.items()}
                for name, kinds in self.worth.items()
            },
            "hits": (np.cumsum(self.choices) / max(1, self.places)).tolist(),
            "places": self.places,
            "tokens": self.tokens,
            "agreement": self.agreed / max(1, self.tokens),
        }


def judge_drafts(
    drafter: Drafter,
    target: Target,
    answers: Sequence[Response],
    plans: Mapping[str, DraftPlan],
    kinds: Sequence[str] = (),
    noise: Noise | None = None,
    quiet: bool = True,
) -> Judged:
    """Return what a drafter's trees are worth on answers.

    Args:
        drafter: The drafter.
        target: Wrote the answers.
        answers: Those of one token are passed over.
        plans: Shapes of drafts by name.
        kinds: Of each answer; none if nothing is said.
        noise: What the answers were drawn with; None if at temperature 0.
        quiet: Draw no progress bar.
    """
    plans = {name: plan.for_support(target.support) for name, plan in plans.items()}
    searches = _searches(plans.values())
    judged = Judged({name: {"": Worth()} for name in plans})
    texts = known_texts(drafter, target, answers, noise)
    for text in tqdm(texts, total=len(answers), unit="answer", disable=quiet, leave=False):
        met = {kind: text.met(drafter, search) for kind, search in searches.items()}
        for name, plan in plans.items():
            found = met[_kind(plan)]
            for kind in {"", kinds[text.row] if kinds else ""}:
                worth = judged.worth[name].setdefault(kind, Worth())
                worth.walk(found.accepted(plan), found.num_nodes(plan))
        judged.choices += _choices(met[_kind(ALL_CHOICES)])
        judged.places += text.tokens.size - 1
        judged.tokens += text.tokens.size
        judged.agreed += text.agreed
    return judged


def _kind(plan: DraftPlan) -> tuple[int, bool]:
    """Return what tells a search from others: its width, or that nothing is searched."""
    static = plan.tree == "static"
    return 0 if static else plan.beam_width, static


def _searches(plans: Iterable[DraftPlan]) -> dict[tuple[int, bool], DraftPlan]:
    """Return searches by kind, one of each, of which every plan's is a part."""
    found: dict[tuple[int, bool], DraftPlan] = {}
    for plan in (ALL_CHOICES, *plans):
        known = found.get(_kind(plan), plan)
        length, nodes = (max(getattr(x, name) for x in (known, plan)) for name in SIZES)
        found[_kind(plan)] = replace(plan, draft_length=length, nodes=nodes)
    return found


def _choices(met: Met) -> Int[np.ndarray, " K"]:
    """Return how often the next token was the drafter's first, second, ... choice."""
    node = met.nodes[:, 0]
    rank = np.take_along_axis(met.ranks(1), np.maximum(node, 0)[:, None], axis=1)[:, 0]
    return np.bincount(rank[node != NOWHERE] - 1, minlength=CHOICES)[:CHOICES]
