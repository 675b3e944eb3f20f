"""Drafters that tap layers of the target are given what those layers return in plain reading."""

import functools
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import KnowingDrafter, with_eos
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import CacheConfig, DraftPlan, InputError
from mlx_distill.checkpoint import bundled
from mlx_distill.drafters.protocol import Features, Outcome
from mlx_distill.speculation.decoding import LOOK_BACK
from mlx_distill.target.reading import read_whole
from mlx_distill.target.taps import tapped

TEXT = [5, 17, 42, 8, 23, 61, 9]
PLAN = DraftPlan(beam_width=3, draft_length=3, nodes=7)


class Tapping(KnowingDrafter):
    """Writes down what it is given; what is drafted is sometimes right and sometimes wrong."""

    def __init__(self, model: Any, text: list[int], taps: tuple[int, ...] = (0, 2)):
        super().__init__(model, text, 40, hide=True)
        self.taps = taps

    def open(self, prompt: mx.array, features: Features) -> Any:
        self.state = Noting(self, features)
        self.first = features.states.shape[0]
        self.state.note(prompt[-self.first :], features)
        return self.state


class Noting:
    def __init__(self, drafter: Tapping, features: Features):
        self.drafter, self.hidden = drafter, features.last
        self.tokens: list[int] = []
        self.seen: list[list[mx.array]] = [[] for _ in drafter.taps]

    def note(self, tokens: mx.array, features: Features) -> None:
        count = int((tokens >= 0).sum().item())
        self.tokens += tokens[:count].tolist()
        assert len(features.tapped) == len(self.seen)
        for rows, outputs in zip(self.seen, features.tapped, strict=True):
            assert outputs.shape[0] == features.hidden.shape[0]
            rows += list(outputs[:count])

    def draft(self, root: mx.array, plan: DraftPlan, noise: mx.array | None) -> Any:
        return self.drafter.draft(self.hidden, root, plan)

    def accept(self, tokens: mx.array, features: Features) -> None:
        self.note(tokens, features)
        self.hidden = features.last

    def rewind(self, num_tokens: int) -> None:
        del self.tokens[-num_tokens:]
        for rows in self.seen:
            del rows[-num_tokens:]


class EverySecond:
    """Parks every second time."""

    def __init__(self) -> None:
        self.number = 0

    def shape(self, text: int, outcome: Outcome | None) -> DraftPlan | None:
        self.number += 1
        return PLAN if self.number % 2 else None


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_eos(mlx_lm.utils.load_tokenizer(bundled("stories-14m")), set())


def outputs_of(model: Any, text: list[int], taps: tuple[int, ...]) -> list[np.ndarray]:
    """Return what layers return when a whole text is read, (T, D) each."""
    with tapped(model, taps) as outputs:
        read_whole(model, mx.array([text]))
    found = [np.array(outputs[tap]) for tap in taps]
    # Of several streams, each token's side by side.
    return [x[0] if x.ndim == 3 else np.concatenate(list(x[:, 0]), axis=-1) for x in found]


@functools.cache
def model_of(name: str) -> Any:
    """Return a model for all tests: it is built and opened once."""
    return tiny_model(name)


WAYS: dict[str, dict[str, Any]] = {
    "trees": {},
    "beams": {"plan": DraftPlan(3, 3, tree="beam")},
    "drawn": {"temperature": 0.7, "seed": 2, "top_p": 0.9},
    "processors": {"logits_processors": make_logits_processors(repetition_penalty=1.1)},
    "parked": {"plan": EverySecond()},
    "chunks": {"cache": CacheConfig(prefill_step_size=3)},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [("llama", way) for way in WAYS]
    + [(name, "trees") for name in ("gpt2", "gpt_bigcode", "gemma3n", "llama-sliding")]
    + [(name, "parked") for name in ("gpt2", "gpt_bigcode")],
)
@pytest.mark.parametrize("earlier", [0, 3])
def test_taps_are_those_of_plain_reading(tokenizer: Any, name: str, way: str, earlier: int) -> None:
    model, caches = model_of(name), None
    if earlier:
        caches = make_prompt_cache(model)
        mx.eval(model(mx.array([TEXT[:earlier]]), cache=caches))
    drafter = Tapping(model, TEXT)
    options: dict[str, Any] = {"plan": PLAN, "max_tokens": 14, **WAYS[way]}
    responses = list(
        mlx_distill.stream_generate(
            model, tokenizer, TEXT[earlier:], drafter=drafter, prompt_cache=caches, **options
        )
    )
    state = drafter.state
    known = len(TEXT) - earlier
    assert drafter.first == known
    written = [response.token for response in responses]
    # The root of a tree that is still on its way was handed out; the rest of what is noted, too.
    assert [*TEXT[earlier:], *written][: len(state.tokens)] == state.tokens[: known + 14]
    assert len(state.tokens) >= known + 12  # what the last call read is looked at by nobody
    text = [*TEXT[:earlier], *state.tokens]
    for rows, expected in zip(state.seen, outputs_of(model, text, drafter.taps), strict=True):
        np.testing.assert_allclose(np.stack(rows), expected[earlier:], atol=2e-3)


def test_a_long_prompt_is_shown_in_part(tokenizer: Any) -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    text = [1 + place * 7 % 90 for place in range(LOOK_BACK + 40)]
    drafter = Tapping(model, text, (-1,))
    options: dict[str, Any] = {"max_tokens": 2, "cache": CacheConfig(prefill_step_size=100)}
    mlx_distill.generate(model, tokenizer, text, drafter=drafter, **options)
    assert drafter.first == LOOK_BACK
    expected = outputs_of(model, text, (-1,))[0][-LOOK_BACK:]
    np.testing.assert_allclose(np.stack(drafter.state.seen[0][:LOOK_BACK]), expected, atol=2e-3)


@pytest.mark.parametrize("tap", [3, -4, 99])
def test_a_tap_out_of_range(tokenizer: Any, tap: int) -> None:
    model = tiny_model("llama")
    drafter = Tapping(model, TEXT, (0, tap))
    with pytest.raises(InputError, match=f"^there is no layer {tap}: Model has 3, 0 to 2$"):
        mlx_distill.stream_generate(model, tokenizer, TEXT, drafter=drafter)
