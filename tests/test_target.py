"""Opened models: watched without a trace, freed at once, copied; in half precision the same."""

import copy
import gc
import threading
import weakref
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.errors import InputError
from mlx_distill.target.reading import read_whole
from mlx_distill.target.target import Target

PROMPT = mx.array([5, 9, 33, 2, 7])
TREE = PrefixTree.from_beams([[1, 2, 3], [1, 4, 5], [1, 2, 7]])


def test_a_model_is_opened_once() -> None:
    model = tiny_model("llama")
    assert Target.of(model) is Target.of(model)
    first = weakref.ref(Target.of(model))
    assert first() is None  # nobody holds it
    assert Target.of(model).support == "row"


def test_a_deleted_model_is_gone_at_once() -> None:
    model = tiny_model("llama")
    target = Target.of(model)
    target.forward(PROMPT, make_prompt_cache(model))
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model, target
        assert seen() is None
    finally:
        gc.enable()


def test_an_opened_model_can_be_copied() -> None:
    model = tiny_model("llama")
    target = Target.of(model)
    expected, hidden = target.read(PROMPT[None])
    other = copy.deepcopy(model)
    logits, states = Target.of(other).read(PROMPT[None])
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(states, hidden)
    assert Target.of(other) is not target
    # It is another model: neither's weights are the other's.
    other.update({"lm_head": {"weight": mx.zeros_like(other.lm_head.weight)}})
    assert not read_whole(other, PROMPT[None]).any().item()
    np.testing.assert_array_equal(target.read(PROMPT[None])[0], expected)
    call = Target.of(other).verify(TREE, make_prompt_cache(other))
    assert not call.logits.any().item()


@pytest.mark.parametrize("name", ["gemma3_text", "llama", "qwen3"])
def test_nodes_are_rotated_the_same_as_a_gpu_does_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By the offsets of a batch, whichever way heads and nodes lie in memory."""
    model, found = tiny_model(name), []
    target = Target.of(model)
    for device in (mx.cpu, mx.gpu):
        caches = make_prompt_cache(model)
        target.forward(PROMPT, caches)
        with monkeypatch.context() as patch:
            patch.setattr(mx, "default_device", partial(mx.Device, device))
            found.append(np.array(target.verify(TREE, caches).logits))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-4)


def made_of_the_same(model: nn.Module) -> nn.Module:
    """Return a model that nobody has opened, with the very layers of another."""
    other = type(model)(model.args)
    for name, part in model.children().items():
        setattr(other, name, part)
    return other


def test_a_thread_that_calls_a_model_does_not_notice_one_that_drafts_for_it() -> None:
    model = tiny_model("llama")
    target = Target.of(model)
    expected, hidden = (np.array(x) for x in target.read(PROMPT[None]))
    wrong: list[object] = []
    done = threading.Event()

    def plainly() -> None:
        while not done.is_set():
            try:
                if not np.array_equal(np.array(read_whole(model, PROMPT[None])), expected):
                    wrong.append("other logits")
            except Exception as error:
                wrong.append(error)

    neighbour = threading.Thread(target=plainly)
    neighbour.start()
    try:
        for _ in range(8):
            caches = make_prompt_cache(model)
            logits, states = target.forward(PROMPT, caches)
            np.testing.assert_array_equal(logits, expected[0])
            np.testing.assert_array_equal(states, hidden[0])
            call = target.verify(TREE, caches)
            mx.eval(call.logits)
            call.commit([0, 1])
            # Opened while the other one calls what it is made of.
            assert Target(made_of_the_same(model)).support == "row"
    finally:
        done.set()
        neighbour.join()
    assert not wrong, wrong[0]


@pytest.mark.parametrize("name", ["llama4_text-tied", "talkie", "seed_oss-tied"])
def test_hidden_states_of_models_that_compute_their_head(name: str) -> None:
    model = tiny_model(name)
    target = Target.of(model)
    assert target.support in ("row", "batch")
    caches = make_prompt_cache(model)
    logits, hidden = target.forward(PROMPT, caches)
    assert hidden.shape == (5, target.hidden_size)
    # The logits are a matrix's product with them: states that are twice as long give twice those.
    weight = model.lm_head if name == "talkie" else model.model.embed_tokens.weight
    product = hidden @ weight.T
    found = np.corrcoef(np.array(product).reshape(-1), np.array(logits).reshape(-1))[0, 1]
    assert found == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", mx.bfloat16),
        ("llama", mx.float16),
        ("qwen3", mx.bfloat16),
        ("gemma3_text", mx.bfloat16),
    ],
)
def test_deep_models_in_half_precision_open_as_what_they_are(name: str, dtype: mx.Dtype) -> None:
    model = tiny_model(name, num_hidden_layers=48)
    model.set_dtype(dtype)
    assert Target.of(model).support == "row"


def test_deep_model_with_the_weights_it_begins_with() -> None:
    model = tiny_model("llama", num_hidden_layers=48)
    mx.random.seed(1)
    for path, weight in tree_flatten(model.parameters()):
        if weight.ndim == 2:
            bound = weight.shape[1] ** -0.5
            model.load_weights([(path, mx.random.uniform(-bound, bound, weight.shape))], False)
    model.set_dtype(mx.bfloat16)
    assert Target.of(model).support == "row"


def test_a_model_whose_logits_are_no_numbers_is_refused() -> None:
    model = tiny_model("llama")
    model.update({"lm_head": {"weight": mx.full((97, 64), mx.nan)}})
    with pytest.raises(InputError, match="not numbers"):
        Target.of(model)


class Miscounting(nn.Module):
    """A llama in which every token also sees how many came with it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama")
        self.model_type = "miscounting"

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        return self.inner(tokens, cache=cache) * (1 + 0.3 * (tokens.shape[1] % 2))


def test_a_model_that_answers_trees_otherwise_than_text_is_refused() -> None:
    target = Target.of(Miscounting())
    assert target.support == "none"
    assert "several tokens at once" in target.reason
    with pytest.raises(InputError, match="miscounting cannot be drafted for"):
        target.require_drafting()
