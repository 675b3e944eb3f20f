"""Targets whose caches take nothing back, from a call to a text.

Where there is no view of a cache, a line is verified in one call, a tree by copies of the cache,
and what is kept is read again.
"""

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import KnowingDrafter, random_drafter, with_eos
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, make_prompt_cache
from test_architectures import assert_same_caches
from test_taps import EverySecond
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import DraftPlan
from mlx_distill.checkpoint import bundled
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.errors import InputError
from mlx_distill.target.target import Target

pytestmark = pytest.mark.usefixtures("not_compiled")  # so many kinds fuse a hundred

TEXT = [5, 17, 42, 8, 23, 61, 9]
CHAIN = [11, 22, 33, 44]
# Nodes, and which of them the chain is.
LINE_OF_IT = PrefixTree.chain(mx.array(CHAIN)), [0, 1, 2, 3]
TREE_OF_IT = (
    PrefixTree.from_parents(mx.array([11, 50, 22, 33, 60, 44]), mx.array([0, 0, 0, 2, 1, 3]), 4),
    [0, 2, 3, 5],
)
# One of each kind of cache: states alone, beside keys, in a list with keys or a window, and a cache
# of the model's own; the states of mixers that are taken apart, and in rows.
ARCHITECTURES = ("mamba2", "qwen3_5", "falcon_h1", "baichuan_m1", "recurrent_gemma", "deepseek_v41")
ARCHITECTURES += ("llama4",)
TREE, LINE = DraftPlan(3, 4, 8), DraftPlan(1, 4, 4)


class Leaky(nn.Module):
    """The smallest recurrent model: a sum of what was read that fades."""

    def __init__(self, cached: bool = True, batches: bool = True):
        super().__init__()
        self.embed = nn.Embedding(97, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 97, bias=False)
        self.layers = [self.norm]
        self.model_type = "leaky"
        self._cached, self._batches = cached, batches
        self._elsewhere: list[Any] = [None]

    def make_cache(self) -> list[ArraysCache]:
        self._elsewhere[0] = None
        return [ArraysCache(1)]

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if tokens.shape[0] > 1 and not self._batches:
            raise ValueError("one text at a time")
        kept = cache[0] if self._cached else self._elsewhere
        state = mx.zeros((tokens.shape[0], 16)) if kept[0] is None else kept[0]
        states = []
        for place in range(tokens.shape[1]):
            state = 0.8 * state + self.embed(tokens[:, place])
            states.append(state)
        kept[0] = state
        return self.head(self.norm(mx.stack(states, axis=1)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_eos(mlx_lm.utils.load_tokenizer(bundled("stories-14m")), set())


def states(caches: list[Any]) -> list[np.ndarray]:
    arrays = (x for cache in caches for _, x in tree_flatten(cache.state))
    return [np.array(x) for x in arrays if isinstance(x, mx.array)]


def read(target: Target, text: list[int]) -> list[Any]:
    caches = make_prompt_cache(target.model)
    mx.eval(target.forward(mx.array(text), caches))
    return caches


def test_a_model_that_takes_no_batches_takes_chains() -> None:
    target = Target.of(Leaky())
    assert (target.support, target.reason) == ("copies", "")
    target = Target.of(Leaky(batches=False))
    assert target.support == "chain"
    assert "cache (ArraysCache) holds no branches" in target.reason


def test_a_state_that_no_cache_holds_is_refused() -> None:
    """It would go on after what was taken back."""
    target = Target.of(Leaky(cached=False))
    assert target.support == "none"


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize("rewound", [None, 0, 1, 2])
@pytest.mark.parametrize(("tree", "nodes"), [LINE_OF_IT, TREE_OF_IT])
def test_what_is_kept_is_as_if_read_alone(
    kept: int, rewound: int | None, tree: PrefixTree, nodes: list[int]
) -> None:
    target = Target.of(Leaky())
    caches = read(target, TEXT)
    call = target.verify(tree, caches)
    for number, node in enumerate(nodes, start=1):
        expected = target.forward(mx.array([*TEXT, *CHAIN[:number]]), target.model.make_cache())
        np.testing.assert_allclose(call.logits[node], expected[0][-1], atol=1e-4)
    call.commit(nodes[:kept])
    end = kept
    if rewound is not None:
        end = min(kept, rewound)
        # Whatever was read since is forgotten, too.
        target.verify(PrefixTree.chain(mx.array(CHAIN)), caches)
        call.rewind(end)
    for found, expected in zip(
        states(caches), states(read(target, [*TEXT, *CHAIN[:end]])), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_texts_and_caches_are_mlx_lms(tokenizer: Any, name: str) -> None:
    model = tiny_model(name)
    knowing = KnowingDrafter(model, TEXT, 22)
    wrong = [(random_drafter(model), TREE), (NGramDrafter(), LINE)]  # a call for every token
    right = [(knowing, LINE), (knowing.hiding(), EverySecond())]
    for drafting, length in ((wrong, 9), (right, 18)):
        options: dict[str, Any] = {"max_tokens": length}
        caches = expected_caches = make_prompt_cache(model)
        steps = mlx_lm.stream_generate(model, tokenizer, TEXT, prompt_cache=caches, **options)
        expected = [response.token for response in steps]
        for drafter, plan in drafting:
            caches = make_prompt_cache(model)
            options |= {"prompt_cache": caches, "plan": plan, "drafter": drafter}
            found = list(mlx_distill.stream_generate(model, tokenizer, TEXT, **options))
            assert [response.token for response in found] == expected
            assert_same_caches(caches, expected_caches)
            assert drafter is not knowing or found[-1].tokens_per_call > 3
    assert found[-1].tokens_per_call > 1.3


@pytest.mark.parametrize(("tree", "nodes"), [LINE_OF_IT, TREE_OF_IT])
def test_windows_that_keep_their_first_tokens(tree: PrefixTree, nodes: list[int]) -> None:
    """Several tokens at once see what they see one by one; mlx-lm's mask drops the first ones."""
    target = Target.of(tiny_model("gpt_bigcode"))
    assert target.support == "copies"
    drafted, plain = ([RotatingKVCache(16, keep=4) for _ in target.model.layers] for _ in range(2))
    for token in [*TEXT, *TEXT, *TEXT]:
        for caches in (drafted, plain):
            target.forward(mx.array([token]), caches)
    call = target.verify(tree, drafted)
    for node, token in zip(nodes, CHAIN, strict=True):
        expected = target.forward(mx.array([token]), plain)[0][0]
        np.testing.assert_allclose(call.logits[node], expected, atol=1e-4)
    call.commit(nodes)
    found, expected = (target.forward(mx.array([7]), caches)[0] for caches in (drafted, plain))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_window_in_which_positions_stand_still_is_refused() -> None:
    target = Target.of(tiny_model("afm7"))
    with pytest.raises(InputError, match=r"RotatingKVCache.* cannot hold the drafts"):
        target.check_caches([RotatingKVCache(16, keep=4)])


def test_a_text_that_is_left_can_be_gone_on_with(tokenizer: Any) -> None:
    """In the middle of a draft; whatever was handed out is in the cache, and no more."""
    model = tiny_model("lfm2")
    options: dict[str, Any] = {"temperature": 0.7, "seed": 3}
    for number in (1, 2, 5, 6):
        caches = make_prompt_cache(model)
        drafter = KnowingDrafter(model, TEXT, 40)
        texts = mlx_distill.stream_generate(
            model, tokenizer, TEXT, drafter=drafter, prompt_cache=caches, max_tokens=30
        )
        written = [next(texts).token for _ in range(number)]
        texts.close()
        assert_same_caches(caches, read(Target.of(model), [*TEXT, *written]))
    drawn = [
        mlx_distill.generate(model, tokenizer, TEXT, drafter=one, max_tokens=20, **options)
        for one in (None, drafter)
    ]
    assert drawn[0] == drawn[1]
