"""What a drafter is worth, by greedy answers that its target has written already.

At temperature 0 the text is known, so nothing has to be generated: the target reads every answer
once, and the drafter is asked at the very places where decoding would ask it. A draft is worth the
tokens of the text that it has in a row, and the one more that every call brings:

    text   the cat sat on the mat        draft at "cat": sat - on - a
    two of three are the text's; the next draft is made at "the", three tokens on
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlx_distill.arrays import to_host
from mlx_distill.distillation.answer_files import WrittenAnswers
from mlx_distill.distillation.drafter import TargetView
from mlx_distill.distillation.responses import Response
from mlx_distill.distillation.target_reader import TargetReader, text_of
from mlx_distill.drafters.protocol import Drafter, DraftPlan, DraftState, Features
from mlx_distill.target.target import Target

AT_ONCE = 64  # answers; the device drafts for all of them before the host reads any


@dataclass
class Worth:
    """What drafts were worth.

    Args:
        calls: Of the target.
        tokens: That the calls brought.
        reached: How many drafts had one, two, ... tokens of the text in a row.
    """

    calls: int = 0
    tokens: int = 0
    reached: list[int] = field(default_factory=list)

    @property
    def tokens_per_call(self) -> float:
        """What a call brought on average."""
        return self.tokens / max(1, self.calls)

    def add(self, accepted: int, brought: int) -> None:
        """Count a draft."""
        self.calls += 1
        self.tokens += brought
        self.reached += [0] * (accepted - len(self.reached))
        for depth in range(accepted):
            self.reached[depth] += 1

    def to_dict(self) -> dict[str, float | int | list[float]]:
        """Return the figures; acceptance is the share of drafts that reached a depth."""
        shares = [count / max(1, self.calls) for count in self.reached]
        return {
            "tokens_per_call": self.tokens_per_call,
            "calls": self.calls,
            "tokens": self.tokens,
            "reached": shares,
        }


def judge_plans(
    drafter: Drafter, target: Target, answers: WrittenAnswers, plans: Sequence[DraftPlan]
) -> dict[str, Any]:
    """Return what drafts of several shapes are worth on greedy answers, by shape and kind."""
    return {
        f"{plan.nodes} nodes": {
            kind or "all": worth.to_dict()
            for kind, worth in judge_drafts(
                drafter, target, answers.responses, plan, answers.kinds
            ).items()
        }
        for plan in plans
    }


def show_drafts(figures: dict[str, Any]) -> None:
    """Print the figures of ``judge_plans``: a column per shape, a row per kind of prompt."""
    table = Table("tokens per call, T = 0", *figures, box=SIMPLE, padding=(0, 1))
    for kind in next(iter(figures.values())):
        cells = (f"{shape[kind]['tokens_per_call']:.3f}" for shape in figures.values())
        table.add_row(escape(kind), *cells)
    Console(highlight=False, soft_wrap=True, width=1000).print(table)


@dataclass
class _Text:
    """An answer that is being gone through; ``place`` is the token that is the root now."""

    answer: list[int]
    kind: str
    rows: slice
    state: DraftState
    place: int = 0


def judge_drafts(
    drafter: Drafter,
    target: Target,
    answers: Sequence[Response],
    plan: DraftPlan,
    kinds: Sequence[str] = (),
    batch_size: int = 16,
) -> dict[str, Worth]:
    """Return what a drafter's trees are worth on greedy answers: in all (""), and by their kinds.

    Args:
        drafter: The drafter.
        target: Wrote the answers at temperature 0.
        answers: Those of one token are passed over.
        plan: What is drafted.
        kinds: Of each answer; none if nothing is said.
        batch_size: Answers that the target reads at once.
    """
    reader = TargetReader(target, drafter.taps, batch_size)
    worth: dict[str, Worth] = {"": Worth()}
    longer = [row for row, one in enumerate(answers) if len(one.response) > 1]
    for start in range(0, len(longer), AT_ONCE):
        rows = longer[start : start + AT_ONCE]
        view = reader.view([text_of(answers[row]) for row in rows], by_length=False)
        texts, first = [], 0
        for row in rows:
            one = answers[row]
            count = len(one.response)
            features = _features(view, slice(first, first + 1))
            state = drafter.open(mx.array(one.prompt), features)
            kind = kinds[row] if kinds else ""
            texts.append(_Text(one.response, kind, slice(first, first + count), state))
            first += count
        _go_through(texts, view, plan.for_support(target.support), worth)
    return worth


def _go_through(
    texts: list[_Text], view: TargetView, plan: DraftPlan, worth: dict[str, Worth]
) -> None:
    """Draft for all texts, a call each at a time, until all are at their ends."""
    while texts:
        drafts = [_draft(text, plan) for text in texts]  # all are on their way before one is read
        for text, draft in zip(texts, drafts, strict=True):
            follows = text.answer[text.place + 1 :]
            accepted = (
                accepted_tokens(to_host(draft[0]), to_host(draft[1]), follows) if draft else 0
            )
            brought = min(accepted + 1, len(follows))
            for kind in {"", text.kind}:
                worth.setdefault(kind, Worth()).add(accepted, brought)
            _accept(text, view, brought)
        texts = [text for text in texts if text.place + 1 < len(text.answer)]


def _draft(text: _Text, plan: DraftPlan) -> tuple[mx.array, mx.array] | None:
    """Return tokens and parents of the tree that would be verified."""
    draft = text.state.draft(mx.array([text.answer[text.place]], mx.int32), plan, None)
    if draft is None:
        return None
    tree = draft.best_first(min(plan.nodes, draft.tokens.size))
    mx.async_eval(tree.tokens, tree.parents)
    return tree.tokens, tree.parents


def _accept(text: _Text, view: TargetView, count: int) -> None:
    """Go on by so many tokens."""
    taken = text.answer[text.place : text.place + count]
    text.place += count
    first = text.rows.start + text.place - count + 1
    if text.place + 1 < len(text.answer):
        text.state.accept(mx.array(taken, mx.int32), _features(view, slice(first, first + count)))


def _features(view: TargetView, rows: slice) -> Features:
    return Features(view.hidden[rows], None, tuple(tap[rows] for tap in view.taps))


def accepted_tokens(tokens: list[int], parents: list[int], follows: Sequence[int]) -> int:
    """Return how many tokens of a text a tree has in a row, from its root on."""
    children = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
    node = 0
    for count, token in enumerate(follows):
        found = children.get((node, token))
        if found is None:
            return count
        node = found
    return len(follows)
