"""Several texts in one call of the target: draft each, verify all, walk each, commit all.

    texts     1   2   3          1   2   3   4          2   3   4
    call      A   P   X          B   Q   X'  M          R   Y   N         one call for all
    accepted  A b c   P   X y    B   Q   -   M n        ...               as many as each comes to
              text 4 joins ^     text 1 ends ^

Every text has a drafter's state, random numbers, processors and an end of its own, so its tokens do
not depend on the others. Their keys and values are rows of one batch (``target.batch``). A call is
on its way before the tokens of the one before it are handed out, as in ``decoding``; so texts that
end or join meanwhile do so behind it.

What goes wrong with one text ends that text alone. What breaks off a call of all, Ctrl-C for
example, leaves every row as long as it was, which is what its text was handed out.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_distill.core.forest import Forest
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.drafters.protocol import Closes, Features
from mlx_distill.speculation.batch_planning import BatchPlanner
from mlx_distill.speculation.batch_prompts import PromptsRead, groups, read_prompts
from mlx_distill.speculation.batched_text import BatchedText, Flight, Held, Written
from mlx_distill.speculation.cycle import Accepted, Cycle, read
from mlx_distill.speculation.decoding import DecodedToken, FirstDraw, count, draw_first
from mlx_distill.speculation.drafting import draft_all, next_draft
from mlx_distill.speculation.ledger import give_up
from mlx_distill.speculation.phases import phase
from mlx_distill.speculation.walking import walk_all
from mlx_distill.target.batch.rows import Rows


class TextBatch:
    """Texts that are written together, with one target and one kind of drafter.

    Args:
        size: So many texts have rows at the most; others wait.

    Attributes:
        texts: Those that have rows, in their order.
        waiting: Those that have not joined yet.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.texts: list[BatchedText] = []
        self.waiting: list[BatchedText] = []
        self.rows: Rows | None = None
        self.flight: Flight | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a call is on its way, or is to be made."""
        return bool(self.texts or self.flight)

    def join(self, text: BatchedText) -> None:
        """Let a text take part from the next step on."""
        self.waiting.append(text)

    def leave(self, text: BatchedText) -> None:
        """End a text; a cache that is kept holds what was handed out."""
        text.ended = True
        try:
            if isinstance(text.decoding.state, Closes):
                text.decoding.state.close()
        finally:
            self._let_go(text)

    def _let_go(self, text: BatchedText) -> None:
        decoding = text.decoding
        if not decoding.keep_caches:
            self.waiting = [one for one in self.waiting if one is not text]
        elif text in self.waiting:
            with mx.stream(generation_stream):
                decoding.ledger.settle()
            self.waiting.remove(text)
        else:
            self._settle(text)

    def step(self) -> list[Written]:
        """Return what was added to the texts; a call for what follows is on its way then.

        Raises:
            BaseException: What broke off the call of all; ``abandon`` what is left then.
        """
        start, flight, waiting = time.perf_counter(), self.flight, len(self.waiting)
        written = self._step()
        if flight is not None and waiting == len(self.waiting):
            self._observe(flight, written, time.perf_counter() - start)
        return written

    def _observe(self, flight: Flight, written: Sequence[Written], seconds: float) -> None:
        """Tell who plans for all texts what their call took."""
        planner = flight.cycles[0][0].decoding.planner
        if isinstance(planner, BatchPlanner):
            tokens = sum(len(one.tokens) for one in written)
            planner.observe(len(flight.cycles), tokens, seconds)

    def _step(self) -> list[Written]:
        with mx.stream(generation_stream):
            if self._goes_on():
                return self._go_on()
            written = self._land()
            self._part()
            written += self._read_prompts()
            self._launch()
        return written

    def abandon(self) -> None:
        """End all texts after a call that broke off, whatever one of them meets."""
        try:
            with ExitStack() as stack:
                for text in [*self.waiting, *self.texts]:
                    stack.callback(self.leave, text)
        finally:
            self.texts, self.rows, self.flight = [], None, None

    def _goes_on(self) -> bool:
        """Return whether the next call is that of the same texts, whatever was drawn."""
        return (
            self.flight is not None
            and all(
                cycle.is_certain and not text.ended and not text.decoding.ends_with(cycle.start + 1)
                for text, cycle in self.flight.cycles
            )
            and not (self.waiting and len(self.texts) < self.size)
        )

    def _go_on(self) -> list[Written]:
        """Launch the next call before what was drawn is read: the device need not wait."""
        flight = self.flight
        assert flight is not None
        draft_all([next_draft(text.decoding, cycle) for text, cycle in flight.cycles])
        for text, cycle in flight.cycles:
            _follow(text, cycle, 1)
        flight.call.commit([[0]] * len(flight.cycles))
        self._launch()
        written = []
        for text, cycle in flight.cycles:
            try:
                accepted = read(text.decoding, cycle)
            except Exception as error:
                written.append(Written(text, error=error))
                continue
            count(text.decoding, cycle, accepted)
            written.append(Written(text, _tokens(accepted)))
        return written

    def _land(self) -> list[Written]:
        """Return what the call on its way adds to the texts, and keep it in their rows."""
        flight = self.flight
        if flight is None:
            return []
        written, paths = [], []
        errors = self._draft(flight)
        for text, cycle in flight.cycles:
            one, path = self._accepted(text, cycle, errors.get(text.number))
            written += one
            paths.append(path)
        with phase("commit", paths) as made:
            flight.call.commit(paths)
            made(*(layer.arrays for layer in flight.call.rows.layers))
        self.flight = None
        return written

    def _draft(self, flight: Flight) -> dict[int, Exception]:
        """Send the next drafts after a call; return what went wrong, by the texts' numbers."""
        wanted, errors = [], {}
        for text, cycle in flight.cycles:
            if text.ended or cycle.walk is None or text.decoding.ends_with(cycle.start + 1):
                continue
            try:
                wanted.append(next_draft(text.decoding, cycle))
            except Exception as error:
                errors[text.number] = error
        draft_all(wanted)
        return errors

    def _accepted(
        self, text: BatchedText, cycle: Cycle, error: Exception | None
    ) -> tuple[list[Written], list[int]]:
        """Return what a cycle adds to a text, and the path that is kept."""
        decoding = text.decoding
        if text.ended:
            return [], []
        try:
            if error is not None:
                raise error
            accepted = read(decoding, cycle)
        except Exception as error:
            return [Written(text, error=error)], []
        count(decoding, cycle, accepted)
        _follow(text, cycle, len(accepted.path))
        return [Written(text, _tokens(accepted))], accepted.path

    def _part(self) -> None:
        """Take the rows of texts that need no more calls out of the batch."""
        live = [
            place
            for place, text in enumerate(self.texts)
            if not (text.ended or text.decoding.ends_with(text.num_tokens))
        ]
        if self.rows is None or len(live) == len(self.texts):
            return
        for place, text in enumerate(self.texts):
            if place not in live and not text.ended and text.decoding.keep_caches:
                text.own = self.rows.take([place])
        self.rows = self.rows.take(live) if live else None
        self.texts = [self.texts[place] for place in live]

    def _read_prompts(self) -> list[Written]:
        """Let the waiting texts join; return their first tokens."""
        written: list[Written] = []
        while self.waiting and len(self.texts) < self.size:
            for group in groups(self.waiting[: self.size - len(self.texts)]):
                try:
                    read = read_prompts(group)
                except Exception as error:
                    written += [self._refuse(text, error) for text in group]
                    continue
                self._seat(group, read.rows)
                written += self._begin(group, read)
            self._part()
        return written

    def _refuse(self, text: BatchedText, error: Exception) -> Written:
        """End a text whose prompt could not be read."""
        if text.decoding.keep_caches:
            text.decoding.ledger.settle()
        self.waiting.remove(text)
        return Written(text, error=error)

    def _seat(self, group: Sequence[BatchedText], rows: Rows) -> None:
        """Give rows to texts whose prompts are read."""
        for text in group:
            text.held = Held(text.decoding.prompt_tokens, None)
            text.start = text.decoding.prompt_tokens - 1
            text.history, text.num_tokens = text.prompt, 1
            if not text.decoding.keep_caches:
                text.decoding.caches.clear()
        if self.rows is None:
            self.rows = rows
        else:
            self.rows.join(rows)
        self.texts += group
        self.waiting = [text for text in self.waiting if text not in group]

    def _begin(self, group: Sequence[BatchedText], read: PromptsRead) -> list[Written]:
        """Return the first tokens of texts, and send the first drafts after them."""
        draws = [
            _attempt(draw_first, text.decoding, text.prompt, logits)
            for text, logits in zip(group, read.logits, strict=True)
        ]
        written = []
        for text, draw, features in zip(group, draws, read.features, strict=True):
            first = draw
            if isinstance(draw, FirstDraw):
                first = _attempt(_open, text, draw, features)
            if isinstance(first, DecodedToken):
                written.append(Written(text, [first]))
                continue
            assert isinstance(first, Exception)
            if text.decoding.keep_caches and self.rows is not None:
                text.own = self.rows.take([self.texts.index(text)])
            text.ended = True
            written.append(Written(text, error=first))
        return written

    def _launch(self) -> None:
        """Send the trees of all texts to the target, and walk each."""
        if not self.texts:
            return
        assert self.rows is not None
        target, drafter = self.texts[0].decoding.target, self.texts[0].decoding.drafter
        forest = Forest.of([_tree(text) for text in self.texts])
        with phase("target", forest) as made:
            call = target.verify_rows(forest, self.rows, drafter.taps)
            made(call.logits, call.hidden, call.taps)
        flight = Flight(call)
        for place, (text, tree) in enumerate(zip(self.texts, forest.trees, strict=True)):
            assert text.history is not None
            own = call.of(place, tree.tokens.size)
            flight.cycles.append((text, Cycle(tree, own, text.num_tokens, text.history)))
        walking = [(text.decoding, cycle) for text, cycle in flight.cycles]
        walk_all(walking, forest, call.logits, call.packing)
        self.flight = flight

    def _settle(self, text: BatchedText) -> None:
        """Let a text's caches hold what was handed out."""
        decoding, held = text.decoding, text.held
        if held is None:  # it failed before its first token, or holds what it held
            return
        rows, place = text.own, 0
        if rows is None:
            if text not in self.texts:
                return
            rows, place = self.rows, self.texts.index(text)
        assert rows is not None
        try:
            with mx.stream(generation_stream):
                rows.give(place, held.rows, decoding.caches)
                if held.missing is not None:
                    decoding.target.forward(mx.array([held.missing]), decoding.caches)
                mx.eval([cache.state for cache in decoding.caches])
        except BaseException:
            give_up(decoding.caches)
            raise


def _follow(text: BatchedText, cycle: Cycle, path: int) -> None:
    """Let a text be the one behind a cycle, of which so many nodes were accepted."""
    text.root, text.draft, text.history = cycle.root, cycle.draft, cycle.history
    text.num_tokens = cycle.start + path
    text.start = text.decoding.prompt_tokens + cycle.start - 1


_Result = TypeVar("_Result")


def _attempt(function: Callable[..., _Result], *arguments: object) -> _Result | Exception:
    """Return what a function does, or what went wrong: that of one text is not that of all."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _open(text: BatchedText, draw: FirstDraw, features: Features) -> DecodedToken:
    """Return a text's first token, and send its first draft after it."""
    first, decoding = draw.read(), text.decoding
    text.root = draw.root
    if not decoding.ends_with(1):
        decoding.state = decoding.drafter.open(text.prompt, features)
        plan = decoding.plan()
        text.draft = decoding.draft(draw.root, plan, lambda length: decoding.rows(1, length))
    return first


def _tree(text: BatchedText) -> PrefixTree:
    assert text.root is not None
    before = text.decoding.prompt_tokens + text.num_tokens - 1
    return text.decoding.tree(text.root, text.draft, before)


def _tokens(accepted: Accepted) -> list[DecodedToken]:
    """Return the tokens of a cycle; all but the last one were drafted."""
    last = len(accepted.tokens)
    return [
        DecodedToken(token, *accepted.rows[number - 1], number < last)
        for number, token in enumerate(accepted.tokens, start=1)
    ]
