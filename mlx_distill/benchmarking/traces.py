"""What a drafter drafts at every place of a text, and what any shape of draft would have come to.

A trace holds a text's places one after the other: of the draft that begins there the likeliest
nodes as parents, the likeliest first, and which of them the text went on with. A smaller shape's
tree is a part of that, so its tokens per cycle follow wherever its cycles begin.

    place   [[0, 0, 1, 0], [1, 2]]     nodes 1 and 3 follow the root, 2 follows 1; text: 1, then 2
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_distill.arrays import to_host
from mlx_distill.core.draft import Draft
from mlx_distill.core.sampling import TextNoise
from mlx_distill.drafters.protocol import Drafter, DraftPlan, Features
from mlx_distill.errors import InputError
from mlx_distill.speculation.generation import stream_generate
from mlx_distill.target.prompt_cache import prompt_caches
from mlx_distill.target.target import Target

# The draft that is recorded, and how many of its nodes.
PLAN = DraftPlan(8, 8)
NODES = 33

Place = Sequence[Sequence[int]]


class TracedText:
    """A text's places, each with the draft that begins there.

    Args:
        places: As ``record_trace`` writes them.

    Raises:
        InputError: If they are no trace.
    """

    def __init__(self, places: Sequence[Place]):
        self.places = places
        if not places or not all(_is_place(place) for place in places):
            raise InputError("a trace must hold places: parents in order, and the nodes that came")
        self.tree = cache(self._tree)
        self.draft = cache(self._draft)
        self.came = cache(self._came)

    def tokens_per_cycle(self, plan: DraftPlan) -> float:
        """Return the tokens that a cycle of one shape adds, over the whole text."""
        place = cycles = 0
        while place < len(self.places):
            place += self.num_tokens(place, plan)
            cycles += 1
        return place / cycles

    def num_tokens(self, place: int, plan: DraftPlan) -> int:
        """Return the tokens that a cycle of a shape adds at a place."""
        came = self.came(place % len(self.places), plan.beam_width, plan.draft_length)
        return 1 + sum(rank < plan.nodes for rank in came)

    def _tree(self, place: int, plan: DraftPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the parents of a shape's tree at a place, and the path that is accepted."""
        place %= len(self.places)
        parents, right, _ = self.draft(place)
        kept = self._held(place, plan.beam_width, plan.draft_length)[: plan.nodes]
        index = {node: number for number, node in enumerate(kept)}
        path = (0, *(index[node] for node in right if node in index))
        return tuple(index[parents[node]] for node in kept), path

    def _held(self, place: int, width: int, length: int) -> list[int]:
        """Return the nodes that beams of a width and a length hold."""
        where = self.draft(place)[2]
        return [n for n, (depth, beam) in enumerate(where) if depth <= length and beam < width]

    def _came(self, place: int, width: int, length: int) -> list[int]:
        """Return where those stand, among the nodes that such beams hold, with which it went on."""
        ranks = {node: rank for rank, node in enumerate(self._held(place, width, length))}
        return [ranks[node] for node in self.draft(place)[1] if node in ranks]

    def _draft(self, place: int) -> tuple[Sequence[int], Sequence[int], list[tuple[int, int]]]:
        """Return the parents, what came, and each node's depth and the narrowest beam with it."""
        parents, right = self.places[place]
        depths, beams, counts = [0], [0], [1]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
            counts += [0] * (depths[-1] + 1 - len(counts))
            beams.append(max(beams[parent], counts[depths[-1]]))
            counts[depths[-1]] += 1
        return parents, right, list(zip(depths, beams, strict=True))


def record_trace(
    pair: tuple[nn.Module, Any],
    drafter: Drafter,
    prompt: Sequence[int],
    temperature: float,
    max_tokens: int = 150,
    seed: int = 1,
) -> dict[str, Any]:
    """Return the trace of a text that the target writes after a prompt."""
    target = Target.of(pair[0])
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
    answer = [r.token for r in stream_generate(*pair, list(prompt), **options)]
    text = [*prompt, *answer]
    _, hidden, taps = target.observe(mx.array(text), prompt_caches(pair[0]), drafter.taps)
    features = Features(hidden, None, taps)
    mx.eval(hidden, taps)
    noise = TextNoise(mx.random.key(seed), target.vocab_size) if temperature else None
    places = []
    for number in range(1, len(answer)):
        root = len(prompt) + number - 1  # the certain token, the text's token number - 1
        state = drafter.open(mx.array(text[:root]), features.rows(slice(root)))
        rows = None if noise is None else temperature * noise.rows(number, PLAN.draft_length)
        draft = state.draft(mx.array(text[root : root + 1]), PLAN, rows)
        places.append([[0], []] if draft is None else _place(draft, text[root:]))
    return {"temperature": temperature, "places": places}


def _place(draft: Draft, text: list[int]) -> list[list[int]]:
    """Return the parents of a draft's likeliest nodes, and which of them the text went on with."""
    scores, depths = to_host(draft.scores), to_host(draft.depths)
    tokens, parents = to_host(draft.tokens), to_host(draft.parents)
    order = sorted(range(len(tokens)), key=lambda node: (-scores[node], depths[node]))[:NODES]
    rank = {node: place for place, node in enumerate(order)}
    path = [0]
    for node in sorted(order, key=lambda one: depths[one])[1:]:
        depth = depths[node]
        if parents[node] == order[path[-1]] and tokens[node : node + 1] == text[depth : depth + 1]:
            path.append(rank[node])
    return [[rank[parents[node]] for node in order], path[1:]]


def _is_place(place: Place) -> bool:
    """Return whether these are a tree's parents in order, and a path of it."""
    if len(place) != 2 or not place[0] or not all(type(n) is int for n in (*place[0], *place[1])):
        return False
    parents, right = place
    links = zip((0, *right), right, strict=False)
    ordered = all(0 <= parent < max(1, node) for node, parent in enumerate(parents))
    return ordered and all(0 < b < len(parents) and parents[b] == a for a, b in links)
