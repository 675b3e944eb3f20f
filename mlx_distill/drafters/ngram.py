"""The n-gram drafter: what followed the last tokens where they stood before.

    text   the cat sat on the mat . the cat      draft   the cat - sat - on - the
           the cat ran . Then the cat                         `- ran - .

It has no weights and needs no training. It looks for the longest endings of the text in the text
itself, and in a store of the latest ones. Where an answer repeats its prompt (summaries, answers
from a context, edits of code), whole phrases are drafted; where nothing repeats nothing is, and the
target decodes plainly.

A node's score is calibrated: how often a match of that length was right so far (``hit_rates``).

Source:
    Saxena 2023, "Prompt lookup decoding"; Yang et al. 2023, arXiv:2304.04487; Oliaro et al. 2024,
    "SuffixDecoding", arXiv:2411.04975 (trees, and a store of earlier outputs).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.arrays import to_host
from mlx_distill.core.draft import WORST_SCORE, Draft, KnownDraft
from mlx_distill.drafters.hit_rates import RANKS, HitRates
from mlx_distill.drafters.lookup import PAIR, Match, Store, Text
from mlx_distill.drafters.protocol import DraftPlan, Features
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, check_value, plain

STORE_TOKENS = 32_768  # about 10 MB
StoreTokens = Annotated[int, Between(0, 10**7)]
# A row costs about a tenth of a step: what is less likely than this is not worth one, and where
# nothing is likelier than this at first, there is no draft.
LEAST_NODE, LEAST_FIRST = 0.05, 0.15
# A draft has room for so many nodes, or twice as many, ...: few sizes, for each compiles a merger.
ROOM = 16
# Of what follows a token, the n-grams never claim all.
MOST_MASS = 0.98


class NGramDrafter:
    """A ``Drafter`` for any target that looks the text's last tokens up.

    Args:
        longest: Matches of so many tokens and longer ones are taken to be alike.
        shortest: Shorter ones are not looked for. From 3 on, the target need not be waited for
            where nothing can match.
        store_tokens: How many tokens of earlier texts are looked at, too; 0 for none: then no text
            leaves anything behind.

    Raises:
        InputError: If these are no such numbers, or out of order.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, longest: int = 16, shortest: int = 3, store_tokens: int = STORE_TOKENS):
        longest, shortest, store_tokens = map(plain, (longest, shortest, store_tokens))
        check_value("longest", longest, int)
        check_value("shortest", shortest, int)
        check_value("store_tokens", store_tokens, StoreTokens)
        if not PAIR <= shortest <= longest <= 64:
            raise InputError(
                f"an n-gram drafter needs {PAIR} <= shortest <= longest <= 64, "
                f"got {shortest} and {longest}"
            )
        self.longest, self.shortest = longest, shortest
        self.store = Store(store_tokens)
        self.rates = HitRates(longest)

    def open(self, prompt: Int[mx.array, " T"], features: Features) -> "NGramState":
        """Return the state of a text that begins with a prompt."""
        return NGramState(self, to_host(prompt))


@dataclass
class Sprouts:
    """A tree of continuations that grows; see ``Draft`` for the fields.

    Args:
        room: So many nodes at most.
        paths: How likely each node is.
        taken: How likely the children of each node are, together, behind it.
        children: Of each node, by their tokens.
    """

    tokens: list[int]
    room: int = ROOM
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    paths: list[float] = field(default_factory=lambda: [1.0])
    taken: list[float] = field(default_factory=lambda: [0.0])
    children: dict[int, dict[int, int]] = field(default_factory=dict)

    def grow(self, match: Match, count: int, rates: HitRates) -> None:
        """Add what followed a match, as far as it is likely."""
        node = 0
        for depth, token in enumerate(match.following(count)):
            siblings = self.children.setdefault(node, {})
            if token in siblings:
                node = siblings[token]
                continue
            share = rates.rate(match.own, len(siblings), match.length + depth)
            share = min(share, MOST_MASS - self.taken[node])
            if share * self.paths[node] < LEAST_NODE or len(self.tokens) == self.room:
                return
            self.taken[node] += share
            node = siblings[token] = self._add(token, node, share)

    def _add(self, token: int, parent: int, share: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.paths.append(self.paths[parent] * share)
        self.taken.append(0.0)
        return len(self.tokens) - 1

    def draft(self) -> Draft:
        """Return the tree."""
        rows = list(zip(self.tokens, self.parents, self.depths, strict=True))
        return KnownDraft.of(rows, [math.log(path) for path in self.paths])

    def filled_up(self) -> Draft:
        """Return the tree with copies of its root behind it, so that its size is one of few."""
        fill = self.room - len(self.tokens)
        nothing = [0] * fill
        rows = self.tokens + self.tokens[:1] * fill, self.parents + nothing, self.depths + nothing
        tokens, parents, depths = (mx.array(row, mx.int32) for row in rows)
        scores = mx.array([math.log(path) for path in self.paths] + [WORST_SCORE] * fill)
        return Draft(tokens, parents, depths, scores, max(self.depths))


class NGramState:
    """A text, and what the n-grams know of it.

    Args:
        drafter: Its store is looked at, too.
        prompt: What the text begins with.
    """

    def __init__(self, drafter: NGramDrafter, prompt: Sequence[int]):
        self.drafter = drafter
        self.text = Text(prompt)
        self.rates = drafter.rates.copy()
        # Accepted, but not looked at: the target may not have come to it yet.
        self._waiting: list[mx.array] = []
        # By how long the text was, with its last token: what is asked for twice is found once.
        self._found: dict[int, tuple[int, list[Match]]] = {}

    def draft(
        self, root: Int[mx.array, " 1"], plan: DraftPlan, noise: Float[mx.array, "L V"] | None
    ) -> Draft | None:
        """Return what followed the last tokens where they stood before, or None."""
        grown = self.sprouts(root, plan)
        return None if grown is None else grown.draft()

    def sprouts(self, root: Int[mx.array, " 1"], plan: DraftPlan) -> Sprouts | None:
        """Return the same before it is on the device.

        A match that includes the root goes on from a shorter one that does not. Where there is none
        the root, which the target may still be at, is not waited for.
        """
        self._take_in()
        if not self._likely():
            return None
        (token,) = to_host(root)
        self.text.push(token)
        room = ROOM
        while room < plan.nodes:
            room *= 2
        grown = Sprouts([token], room)
        for match in self._matches():
            if match.length >= self.drafter.shortest:
                grown.grow(match, plan.draft_length, self.rates)
        self.text.pop()
        return grown if max(grown.paths[1:], default=0.0) >= LEAST_FIRST else None

    def wakes(self, root: Int[mx.array, " 1"]) -> bool:
        """Return whether a match may go on behind a token that is known; see ``Listens``."""
        self._take_in()
        (token,) = to_host(root)
        self.text.push(token)
        likely = self._likely()
        self.text.pop()
        return likely

    def accept(self, tokens: Int[mx.array, " T"], features: Features) -> None:
        """Put what became text behind it, when that is known."""
        self._waiting.append(tokens)

    def rewind(self, num_tokens: int) -> None:
        """Take the last tokens away again."""
        self._take_in()
        self._found = {}
        for _ in range(num_tokens):
            self.text.pop()

    def close(self) -> None:
        """Leave the text, and how good its matches were, to those that come later."""
        self._take_in()
        if self.drafter.store.num_tokens:
            self.drafter.store.add(self.text)
            self.drafter.rates = self.rates

    def _take_in(self) -> None:
        """Look at what was accepted; this waits for the target."""
        for tokens in self._waiting:
            for token in to_host(tokens):
                if token >= 0:
                    self._learn(token)
                    self.text.push(token)
        self._waiting = []
        size = len(self.text.tokens)
        self._found = {at: found for at, found in self._found.items() if at >= size}

    def _learn(self, token: int) -> None:
        """Compare a token with what the matches before it said."""
        said: list[int] = []
        for match in self._matches():
            following = match.following(1)
            if following and following[0] not in said:
                self.rates.learn(match.own, len(said), match.length, following[0] == token)
                said += following
                if len(said) == RANKS:
                    break

    def _likely(self) -> bool:
        """Return whether what a match says is likely enough to wait for what is drawn.

        Of pairs of tokens, any may go on.
        """
        least = self.drafter.shortest - 1
        if least < PAIR:
            return True
        rates = (
            self.rates.rate(one.own, 0, one.length)
            for one in self._matches()
            if one.length >= least
        )
        return max(rates, default=0.0) >= LEAST_FIRST

    def _matches(self) -> list[Match]:
        """Return where the text's end stood before, the longest matches first, newer ones first."""
        text, longest = self.text, self.drafter.longest
        size, last = len(text.tokens), text.tokens[-1]
        known = self._found.get(size)
        if known is None or known[0] != last:
            texts = chain([text], self.drafter.store.having(text))
            found = [match for other in texts for match in other.matches(text, longest)]
            found.sort(key=lambda match: -match.length)
            known = self._found[size] = last, found
        return known[1]
