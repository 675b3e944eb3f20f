"""Where a model's logits are made, and of what: its head and its hidden states.

The place is found by running a few tokens with every module watched:

    ids -> [embedding] -> ... layers ... -> [norm] -> hidden -> [head] -> (scale, cap) -> logits

Most models have a module for the head, and the hidden states are what it is given. Some compute
``hidden @ weight.T`` themselves; there, the hidden states are what the last module as wide as the
embedding returns. Drafters are given the hidden states; losses make logits of some of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
from mlx import nn

from mlx_distill.target.watching import METHODS, Call, Heard, listening_once


@dataclass(frozen=True)
class Head:
    """The place in a model where its hidden states are.

    Args:
        module: The head, or where the model has none, the module that returns the hidden states.
        method: Which of its methods.
        given: Whether the hidden states are what it is given, or what it returns.
        body: What is called once and returns last before the hidden states are there, with their
            shape; None if there is nothing of that kind.
        behind: The modules that are called from there on, the head among them.
    """

    module: nn.Module
    method: str
    given: bool
    body: nn.Module | None
    behind: tuple[nn.Module, ...]

    def heard(self, found: list[mx.array]) -> Heard:
        """Return what has to stand around the module so that hidden states are collected."""

        def around(call: Call, *args: object, **kwargs: object) -> object:
            output = call(*args, **kwargs)
            states = args[0] if self.given else output
            if isinstance(states, mx.array):
                found.append(states)
            return output

        return Heard(self.module, around, self.method)


class Found(NamedTuple):
    """What a look at a model found.

    Args:
        logits: Of the tokens it was called with.
        hidden: Their hidden states; None without a head.
        head: Where those are; None if no place was found.
        embed: The module that was given the token ids first; None if there is none.
    """

    logits: mx.array
    hidden: mx.array | None
    head: Head | None
    embed: nn.Module | None


class _Event(NamedTuple):
    """One call of a module; its place is among all, in the order in which they return."""

    place: int
    module: nn.Module
    method: str
    given: mx.array
    output: mx.array
    begin: int  # calls that had returned when it began

    @property
    def takes_ids(self) -> bool:
        """Whether it was given token ids, or other numbers of rows."""
        return mx.issubdtype(self.given.dtype, mx.integer)

    @property
    def is_projection(self) -> bool:
        """Whether its module is a matrix, as embeddings and heads are, not the gates of experts."""
        weight = self.module.get("weight")
        return isinstance(weight, mx.array) and weight.ndim == 2


def find_head(network: nn.Module, tokens: mx.array, **inputs: object) -> Found:
    """Call a network once, with every module watched, and find where its hidden states are.

    Args:
        network: A language model.
        tokens: Token ids, (1, T).
        inputs: What else it is called with: its cache.
    """
    events: list[_Event] = []
    parts = {id(part): part for _, part in network.named_modules() if part is not network}
    heard = [
        Heard(part, _noting(events, part, method), method)
        for part in parts.values()
        for method in METHODS
        if hasattr(type(part), method)
    ]
    with listening_once(heard):
        logits = network(tokens, **inputs)
    embedded = next((e for e in events if e.takes_ids and e.is_projection), None)
    embed = embedded.module if embedded else None
    place = _head_call(events, logits)
    given = place is not None
    if place is None and embedded is not None:
        place = _last_of_shape(events, embedded.output.shape)
    if place is None:
        return Found(logits, None, None, embed)
    hidden = place.given if given else place.output
    body = _body(events, place) if given else place.module
    behind = [event.module for event in events[place.place + (not given) :]]
    head = Head(place.module, place.method, given, body, tuple(behind))
    return Found(logits, hidden, head, embed)


def _head_call(events: list[_Event], logits: mx.array) -> _Event | None:
    """Return the last call that made as many values of states as there are logits."""
    shape = logits.shape
    for event in reversed(events):
        makes = not event.takes_ids and event.output.shape == shape
        # A gain or a cap behind the head is given logits already.
        if makes and (event.is_projection or event.given.shape != shape):
            # Behind the head there are no states any more: it was a layer's matrix.
            later = events[event.place + 1 :]
            states = [e for e in later if not e.takes_ids and e.output.shape == event.given.shape]
            return None if states else event
    return None


def _last_of_shape(events: list[_Event], shape: tuple[int, ...]) -> _Event | None:
    return next((e for e in reversed(events) if e.output.shape == shape), None)


def _body(events: list[_Event], head: _Event) -> nn.Module | None:
    """Return what was called once and returned last before the head, with its input's shape."""
    before = [e for e in events[: head.begin] if e.output.shape == head.given.shape]
    if not before or sum(e.module is before[-1].module for e in events) > 1:
        return None
    return before[-1].module


def _noting(events: list[_Event], module: nn.Module, method: str) -> Call:
    def around(call: Call, *args: object, **kwargs: object) -> object:
        begin = len(events)
        output = call(*args, **kwargs)
        if args and isinstance(args[0], mx.array) and isinstance(output, mx.array):
            events.append(_Event(len(events), module, method, args[0], output, begin))
        return output

    return around
