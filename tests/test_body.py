"""Models cut at their hidden states: the two parts make the model's logits and gradients."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten
from tiny_models import TINY_CONFIGS, tiny_model

from mlx_distill.losses.chunked import chunked_loss
from mlx_distill.target.body import Body, ReplayedHead, TiedHead
from mlx_distill.target.reading import read_whole

pytestmark = pytest.mark.usefixtures("not_compiled")  # so many kinds fuse a hundred

TOKENS = mx.array([[5, 9, 33, 2, 7], [60, 1, 1, 4, 90]])


@pytest.mark.parametrize("name", sorted(set(TINY_CONFIGS) - {"phi3small"}))
def test_body_and_head_make_the_models_logits(name: str) -> None:
    model = tiny_model(name)
    logits = read_whole(model, TOKENS)
    body = Body.of(model)
    assert body is not None
    assert body.num_entries == logits.shape[-1]
    hidden = body(TOKENS)
    np.testing.assert_allclose(body.head(hidden), logits, atol=1e-5)
    flat = hidden.reshape(-1, hidden.shape[-1])
    np.testing.assert_allclose(body.head(flat)[3:7], body.head(flat[3:7]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", nn.Linear),
        ("llama-tied", TiedHead),
        ("gpt2", TiedHead),
        ("starcoder2-tied", TiedHead),
        ("gemma2", ReplayedHead),  # capped
        ("granite", ReplayedHead),  # scaled
        ("llama4_text-tied", ReplayedHead),  # no module sees the hidden states
        ("talkie", ReplayedHead),  # the same, and a matrix that no module owns
    ],
)
def test_gradients_reach_all_that_logits_are_made_of(name: str, kind: type) -> None:
    model = tiny_model(name)
    body = Body.of(model)
    assert body is not None
    assert isinstance(body.head, kind)

    def loss(logits: mx.array) -> tuple[mx.array, mx.array]:
        return mx.square(mx.logsumexp(logits, axis=-1)).sum(), mx.array(1.0)

    def whole(model: nn.Module) -> mx.array:
        return loss(read_whole(model, TOKENS))[0]

    def in_chunks(_: nn.Module) -> mx.array:
        hidden = body(TOKENS)
        return chunked_loss(body.head, hidden.reshape(10, -1), loss, [], chunk_size=3)[0]

    expected, found = (
        dict(tree_flatten(value_and_grad(model, one)(model)[1])) for one in (whole, in_chunks)
    )
    for path, gradient in expected.items():
        scale = max(1.0, mx.abs(gradient).max().item())
        np.testing.assert_allclose(found[path], gradient, atol=1e-5 * scale, err_msg=path)


def test_body_of_a_quantised_model() -> None:
    model = tiny_model("llama")
    nn.quantize(model, group_size=32, bits=8)
    body = Body.of(model)
    assert body is not None
    np.testing.assert_allclose(body.head(body(TOKENS)), model(TOKENS), atol=1e-5)


def test_logits_that_depend_on_the_tokens_have_no_body() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.bias = nn.Embedding(8, 8)
            self.head = nn.Linear(4, 8)

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.head(self.embed(tokens)) + self.bias(tokens)

    assert Body.of(Biased()) is None
