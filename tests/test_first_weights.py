"""The weights with which a drafter of a target begins: its head, and inputs of its size."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.distillation.first_weights import begin_near
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig

WIDTH, TOKENS = 16, 40


def draws(*shape: int, scale: float = 1.0) -> mx.array:
    found = np.random.default_rng(shape).normal(scale=scale, size=shape)
    return mx.array(found.astype(np.float32))


def size(x: mx.array) -> float:
    return float(np.sqrt(np.mean(np.square(np.array(x.astype(mx.float32))))))


def begun(
    embedding_scale: float = 0.01, dtype: mx.Dtype = mx.float32, **shape: int | str | bool
) -> tuple[RecurrentDrafter, mx.array, mx.array, mx.array]:
    """Return a drafter, the rows it begins with, what the head saw and what followed."""
    mx.random.seed(1)
    settings = {"exit_dim": WIDTH, "num_draft_layers": 1, "cell": "gru", "context_state": True}
    network = RecurrentDrafter(RecurrentDrafterConfig(WIDTH, TOKENS, **(settings | shape)))
    rows, hidden = draws(TOKENS, WIDTH), draws(30, WIDTH, scale=3.0)
    embeddings = draws(31, WIDTH, scale=embedding_scale)[1:]
    parts = [part.astype(dtype) for part in (rows, hidden, embeddings)]
    begin_near(network, *parts)
    return network, *parts


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("scale", [1e-4, 0.01, 100.0])
def test_what_tokens_say_is_as_large_as_the_context(scale: float, dtype: mx.Dtype) -> None:
    network, _, hidden, embeddings = begun(scale, dtype)
    hidden, embeddings = hidden.astype(mx.float32), embeddings.astype(mx.float32)
    assert size(network.read(embeddings)) == pytest.approx(1, rel=1e-3)
    state = network.advance(network.begin(hidden), network.read(embeddings))
    assert state is not None
    context = network.context(hidden)
    added = network.input_proj(mx.concatenate([hidden, state], axis=-1)) - context
    assert size(added) == pytest.approx(size(context), rel=1e-3)


@pytest.mark.parametrize("shape", [{}, {"exit_dim": 8}, {"head_rank": 8}, {"cell": "elman"}])
def test_a_drafter_begins_with_its_targets_order_of_tokens(shape: dict[str, int | str]) -> None:
    """Of the context alone, less sure; a narrower head as far as its directions reach."""
    network, rows, hidden, _ = begun(num_draft_layers=0, **shape)
    found = network.logits(network.context(hidden), mx.zeros_like(hidden))
    centred = found - mx.mean(found, axis=-1, keepdims=True)
    assert size(centred) == pytest.approx(1, rel=1e-3)
    expected = np.array(hidden @ rows.T)
    alike = np.corrcoef(np.array(found).ravel(), expected.ravel())[0, 1]
    assert alike > (0.999 if shape in ({}, {"cell": "elman"}) else 0.7)


def test_a_wider_head_has_tokens_of_that_size_alone() -> None:
    network, _, hidden, embeddings = begun(exit_dim=2 * WIDTH)
    assert size(network.read(embeddings)) == pytest.approx(1, rel=1e-3)
    assert network.logits(hidden, mx.zeros_like(hidden)).shape == (30, TOKENS)


def test_nothing_to_go_by_changes_no_sizes() -> None:
    """An answer of one token has none that follows; a broken model's numbers are none."""
    for scale in (0.0, float("nan")):
        network, *_ = begun(scale)
        mx.random.seed(1)
        assert size(network.rnn_w.weight) == pytest.approx(size(begun_without().rnn_w.weight))


def begun_without() -> RecurrentDrafter:
    mx.random.seed(1)
    shape = RecurrentDrafterConfig(WIDTH, TOKENS, WIDTH, 1, cell="gru", context_state=True)
    return RecurrentDrafter(shape)
