"""Texts that share the calls of the target are those that are written alone."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from drafting import random_drafter, written_together
from half_models import TYPES
from mlx_lm.models.cache import make_prompt_cache

import mlx_distill
from mlx_distill import DraftPlan
from mlx_distill.core.forest import Packing
from mlx_distill.core.sampling import Sampling
from mlx_distill.drafters.protocol import FixedPlanner, Outcome
from mlx_distill.speculation.batch_planning import BatchPlanner
from mlx_distill.speculation.caching import CacheConfig
from mlx_distill.speculation.engine import Engine
from mlx_distill.speculation.requests import Request

PROMPTS = (
    "Once upon a time",
    "The old baker forgot his hat on the way home from the market, and",
    "Ben had a red kite.",
    "One",
    "Lily and her mother went to the park to see the ducks on the",
)
LAWS = (Sampling(), Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=40), Sampling())


def request(pair: tuple[Any, Any], place: int, **options: Any) -> Request:
    options = {"max_tokens": 7 + 3 * place, "seed": place, **options}
    planner = FixedPlanner(DraftPlan(3, 4, 6 - 2 * (place % 3)))  # trees of several sizes
    return Request(mx.array(pair[1].encode(PROMPTS[place])), planner=planner, **options)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("drafting", [True, False])
def test_texts_and_caches_are_those_alone(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, count: int, drafting: bool
) -> None:
    model, drafter = bundled_pair[0], bundled_drafter if drafting else None
    caches = [make_prompt_cache(model) for _ in range(count)]
    alone = [make_prompt_cache(model) for _ in range(count)]
    expected = [
        written_together(
            Engine(*bundled_pair, drafter),
            [request(bundled_pair, place, sampling=law, prompt_cache=alone[place])],
        )[0]
        for place, law in enumerate(LAWS[:count])
    ]
    engine = Engine(*bundled_pair, drafter, batch=5)
    requests = [
        request(bundled_pair, place, sampling=law, prompt_cache=caches[place])
        for place, law in enumerate(LAWS[:count])
    ]
    assert written_together(engine, requests) == expected
    for ours, theirs in zip(caches, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.offset == other.offset
            for a, b in zip(one.keys_and_values(), other.keys_and_values(), strict=True):
                assert mx.allclose(a, b, atol=1e-4).item()


@pytest.mark.parametrize("law", [Sampling(), Sampling(0.9, top_p=0.9)])
def test_uneven_trees_are_verified_without_padding(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    monkeypatch: pytest.MonkeyPatch,
    law: Sampling,
) -> None:
    """The model is given the nodes that there are, and the texts are those that they are alone."""
    lines = []
    line = Packing.line

    def noted(packing: Packing, x: mx.array) -> mx.array:
        lines.append(packing.num_nodes)
        return line(packing, x)

    monkeypatch.setattr(Packing, "line", noted)
    sizes = (10, 2, 1, 3)
    requests = [
        replace(
            request(bundled_pair, place, sampling=law, max_tokens=12),
            planner=FixedPlanner(DraftPlan(3, 4, size)),
        )
        for place, size in enumerate(sizes)
    ]
    expected = [written_together(Engine(*bundled_pair), [one])[0] for one in requests]
    assert written_together(Engine(*bundled_pair, bundled_drafter, batch=4), requests) == expected
    assert sum(sizes) in lines


def test_drafts_of_several_texts_are_one_search(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    together = type(bundled_drafter).draft_together

    def noted(drafter: Any, contexts: Any, *others: Any) -> Any:
        sizes.append(len(contexts))
        return together(drafter, contexts, *others)

    monkeypatch.setattr(type(bundled_drafter), "draft_together", noted)
    alike = [
        replace(request(bundled_pair, 0), prompt=request(bundled_pair, n).prompt) for n in (0, 2)
    ]
    written_together(Engine(*bundled_pair, bundled_drafter, batch=2), alike)
    assert 2 in sizes


@pytest.mark.parametrize("law", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
def test_texts_join_and_leave_at_any_cycle(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, law: Sampling
) -> None:
    def asked(place: int, **options: Any) -> Request:
        return request(bundled_pair, place, sampling=law, max_tokens=14, **options)

    alone = [
        written_together(Engine(*bundled_pair, bundled_drafter), [asked(place)])[0]
        for place in range(4)
    ]
    engine = Engine(*bundled_pair, bundled_drafter, batch=3)
    caches = make_prompt_cache(bundled_pair[0])
    numbers, found = [engine.submit(asked(0, prompt_cache=caches))], dict[int, list[int]]()
    for number in range(40):
        for one in engine.step():
            found.setdefault(one.request, []).append(one.response.token)
        if number in (0, 2, 3):  # the last one has to wait for room
            numbers.append(engine.submit(asked(len(numbers))))
        if number == 4:
            assert len(engine.texts) == 4
            engine.cancel(numbers[0])
    assert not engine.busy
    left = found[numbers[0]]
    assert [alone[0][: len(left)], *alone[1:]] == [found[number] for number in numbers]
    assert 3 < len(left) < 14
    assert caches[0].offset == len(bundled_pair[1].encode(PROMPTS[0])) + len(left)
    again = mlx_distill.stream_generate(
        *bundled_pair, [left[-1]], max_tokens=1, prompt_cache=cut(caches)
    )
    if not law.temperature:
        assert next(again).token == alone[0][len(left)]


def cut(caches: list[Any]) -> list[Any]:
    """Take back the last token."""
    for cache in caches:
        cache.trim(1)
    return caches


def test_what_goes_wrong_with_one_text_ends_that_one(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any
) -> None:
    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > 12:
            raise RuntimeError("enough")
        return logits

    def forbid(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == 13, -mx.inf, logits)

    prompts = ["Once upon a time", "", PROMPTS[2], [5] * 3000, PROMPTS[3]]
    each = [
        {"logits_processors": [forbid]},
        {},
        {"logits_processors": [fail]},
        {},
        {"max_tokens": 3, "stop": ["."]},
    ]
    options = {"drafter": bundled_drafter, "plan": DraftPlan(), "max_tokens": 20}
    answers = mlx_distill.batch_generate(*bundled_pair, prompts, each=each, batch=3, **options)
    errors = [str(answer.error) for answer in answers]
    assert [answer.index for answer in answers] == [0, 1, 2, 3, 4]
    assert errors[0] == errors[4] == "None"
    for place, reason in ((1, "empty"), (2, "enough"), (3, "context")):
        assert reason in errors[place]
    for place in (0, 4):
        own = {**options, **each[place]}
        assert answers[place].text == mlx_distill.generate(*bundled_pair, prompts[place], **own)


class Interrupting:
    """Ctrl-C while the so-many-th draft is planned."""

    def __init__(self, calls: int):
        self.calls = calls

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan:
        self.calls -= 1
        if not self.calls:
            raise KeyboardInterrupt
        return DraftPlan(3, 4, 6)


@pytest.mark.parametrize("calls", [2, 5, 9])
def test_an_interrupt_leaves_nothing_broken(
    bundled_pair: tuple[Any, Any], bundled_drafter: Any, calls: int
) -> None:
    """Whenever it comes, the caches that are kept hold what was handed out."""
    engine, planner = Engine(*bundled_pair, bundled_drafter, batch=2), Interrupting(calls)
    caches = [make_prompt_cache(bundled_pair[0]) for _ in range(2)]
    found: dict[int, list[int]] = {}
    for place in range(2):
        one = request(bundled_pair, place, prompt_cache=caches[place])
        found[engine.submit(replace(one, planner=planner))] = []

    def go_on() -> None:
        while engine.busy:
            for each in engine.step():
                found[each.request].append(each.response.token)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert not engine.texts
    for place, tokens in enumerate(found.values()):
        handed_out = len(bundled_pair[1].encode(PROMPTS[place])) + len(tokens)
        assert {cache.offset for cache in caches[place]} == {handed_out}
    following = request(bundled_pair, 3, max_tokens=3)
    assert written_together(engine, [following]) == written_together(
        Engine(*bundled_pair, None), [following]
    )


class Clock:
    """What calls take by the shape of their trees, and what they add to a text."""

    def __init__(self, plain_s: float, drafted_s: float, tokens: float):
        self.plain_s, self.drafted_s, self.tokens = plain_s, drafted_s, tokens

    def run(self, planner: BatchPlanner, cycles: int, texts: int = 4) -> tuple[float, float, float]:
        """Return the tokens and seconds of a run, and the share of its later cycles that drafted.

        A call that is taken in was planned two choices before, as in the loop.
        """
        shapes: list[DraftPlan | None] = [None, None]
        written, elapsed, drafted = 0.0, 0.0, 0
        for cycle in range(cycles):
            shape = shapes[0]
            tokens = 1.0 if shape is None else self.tokens
            seconds = self.plain_s if shape is None else self.drafted_s
            planner.observe(texts, round(tokens * texts), seconds)
            shapes = [shapes[1], planner.shape(0, None)]
            written, elapsed = written + tokens, elapsed + seconds
            drafted += shape is not None and cycle >= cycles // 2
        return written, elapsed, drafted / (cycles - cycles // 2)


def test_batches_are_drafted_for_where_that_pays() -> None:
    written, elapsed, share = Clock(0.01, 0.015, 2.5).run(BatchPlanner(), 800)
    assert share > 0.8
    assert written / elapsed > 1.3 / 0.01


@pytest.mark.parametrize("cycles", [100, 400, 4000])
def test_batches_lose_little_where_it_does_not(cycles: int) -> None:
    for clock in (Clock(0.01, 0.04, 2.0), Clock(0.01, 0.0125, 1.0), Clock(0.01, 0.02, 1.9)):
        written, elapsed, share = clock.run(BatchPlanner(), cycles)
        assert share < 0.1
        assert written / elapsed > 0.97 / 0.01


def test_what_was_learned_of_a_batch_serves_the_next() -> None:
    planner = BatchPlanner()
    Clock(0.01, 0.015, 2.5).run(planner, 400)
    written, elapsed, _ = Clock(0.01, 0.015, 2.5).run(planner, 60)
    assert written / elapsed > 1.4 / 0.01


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exact_rows": True}, "exact rows are those of a text alone"),
        (
            {"cache": CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=6)},
            "its keys and values are quantised while it is written",
        ),
    ],
)
def test_texts_that_cannot_share_a_call_are_written_one_by_one(
    bundled_pair: tuple[Any, Any],
    bundled_drafter: Any,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    reason: str,
) -> None:
    options |= {"drafter": bundled_drafter, "plan": DraftPlan(), "max_tokens": 4}
    found = mlx_distill.batch_generate(*bundled_pair, PROMPTS[:3], **options)
    said = capsys.readouterr().err
    assert said.count(f"one by one: {reason}") == 1
    for answer, prompt in zip(found, PROMPTS[:3], strict=True):
        assert answer.text == mlx_distill.generate(*bundled_pair, prompt, **options)


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("weights", TYPES)
def test_texts_share_calls_in_the_types_that_models_come_in(
    as_on_a_gpu: None, model_in: Any, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each token is a likeliest one of the model's own word on its text, as far as that rounds."""
    model, tokenizer = mlx_distill.checkpoint.load(model_in("tiny", weights))
    drafter = random_drafter(model, 512)
    for drafts in ({}, {"drafter": drafter, "plan": DraftPlan(3, 4, 6)}):
        found = mlx_distill.batch_generate(
            model, tokenizer, PROMPTS, batch=3, max_tokens=8, **drafts
        )
        for answer, prompt in zip(found, PROMPTS, strict=True):
            text = tokenizer.encode(prompt)
            said = model(mx.array([text + answer.tokens]))[0, len(text) - 1 : -1].astype(mx.float32)
            short = said.max(axis=-1) - said[mx.arange(len(answer.tokens)), mx.array(answer.tokens)]
            assert answer.tokens
            assert short.max().item() < 0.02 * (said.max() - said.min()).item()
    assert "one by one" not in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_cache_is_of_one_text(pair: tuple[Any, Any], batch: int) -> None:
    """What the second text went on with depended on how many were written at once."""
    shared, own = make_prompt_cache(pair[0]), make_prompt_cache(pair[0])

    def answers(prompts: Any, **options: Any) -> list[mlx_distill.Answer]:
        return mlx_distill.batch_generate(*pair, prompts, batch=batch, max_tokens=4, **options)

    for options in (
        {"prompt_cache": shared},
        {"each": [{"prompt_cache": shared}] * 2},
        {"each": [{"prompt_cache": shared}, {"prompt_cache": list(shared)}]},
    ):
        with pytest.raises(mlx_distill.InputError, match="a prompt cache is of one text"):
            answers(PROMPTS[:2], **options)
    assert shared[0].offset == 0
    found = answers(PROMPTS[:2], each=[{"prompt_cache": shared}, {"prompt_cache": own}])
    assert all(one.error is None for one in found)
    assert answers(PROMPTS[:1], prompt_cache=make_prompt_cache(pair[0]))[0].text == found[0].text
