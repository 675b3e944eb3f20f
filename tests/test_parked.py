"""Where nothing is drafted, a token costs what plain decoding costs, and the text is the same."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from drafting import KnowingDrafter, with_eos
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from test_taps import EverySecond
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import CacheConfig, NGramDrafter
from mlx_distill.checkpoint import bundled
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.core.sampling import Sampling, TextNoise
from mlx_distill.drafters.protocol import DraftPlan, FixedPlanner, Outcome
from mlx_distill.speculation.cycle import RootReport, launch
from mlx_distill.speculation.drafted_text import Decoding
from mlx_distill.speculation.plain import PlainSampler
from mlx_distill.target.target import Target

TEXT = [5, 17, 42, 8, 23, 61, 9]
# They rename an array and compute nothing.
VIEWS = {"Reshape", "ExpandDims", "Squeeze", "Slice", "Broadcast", "Transpose", "Unflatten"}


class Parked:
    def shape(self, text: int, outcome: Outcome | None) -> None:
        return None


class Resting(EverySecond):
    """Rests for some steps now and then, and is told of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rests: list[int] = []

    def rest(self, text: int, outcome: Outcome | None) -> int:
        return 5

    def rested(self, text: int, steps: int, seconds: float | None) -> None:
        self.rests.append(steps)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_eos(mlx_lm.utils.load_tokenizer(bundled("stories-14m")), set())


def operations(folder: Path, *arrays: mx.array) -> Counter[str]:
    """Return how often the graph of arrays that are not computed yet has each operation."""
    mx.export_to_dot(str(folder / "graph.dot"), *arrays)
    text = (folder / "graph.dot").read_text()
    names = re.findall(r'label ?="(\w+)", shape=rectangle', text)
    assert len(names) > 50
    return Counter(name for name in names if name not in VIEWS)


def read(model: Any) -> list[Any]:
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([TEXT]), cache=caches))
    return caches


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_bigcode", "qwen3_moe", "deepseek_v3", "llama4_text"]
)
def test_a_root_alone_is_a_plain_call(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    target, root = Target.of(model), mx.array([5])
    call = target.verify(PrefixTree.root(root), read(model))
    plain = model(root[None], cache=read(model))
    assert operations(tmp_path, call.logits) == operations(tmp_path, plain)


@pytest.mark.parametrize("law", [Sampling(), Sampling(0.7), Sampling(0.7, top_p=0.9)], ids=str)
def test_a_parked_cycle_is_plain_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, law: Sampling
) -> None:
    model = tiny_model("llama")
    key, root = mx.random.key(3), mx.array([5])
    noise = TextNoise(key, 97) if law.temperature else None
    planner = FixedPlanner(DraftPlan())
    arguments = (Target.of(model), NGramDrafter(), planner, law, noise, CacheConfig(), read(model))
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
    cycle = launch(Decoding(*arguments), root, None, root, 1)
    assert isinstance(cycle.report, RootReport)
    sampler = PlainSampler(law, key, fast=True, processed=False)
    logits = model(root[None], cache=read(model))[:, -1, :]
    token = sampler(logits - mx.logsumexp(logits, keepdims=True))
    draw = sampler.draws[0]
    looked_at = [draw.failed] + ([] if draw.certain is None else [draw.certain])
    more = operations(tmp_path, *cycle.report.arrays) - operations(tmp_path, token, *looked_at)
    # Of logits that are not normalised, one may be no number where the first is one.
    assert more <= Counter({"Max": 1})


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 4},
    "filters": {"temperature": 0.8, "seed": 4, "top_p": 0.8, "top_k": 9},
    "processors": {"logits_processors": make_logits_processors(repetition_penalty=1.2)},
    "quantised": {"cache": CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=12)},
    "window": {},
}


@pytest.fixture(scope="module")
def known() -> tuple[Any, KnowingDrafter]:
    model = tiny_model("llama", head_dim=32)
    return model, KnowingDrafter(model, TEXT, 40, hide=True)


def text_and_end(
    tokenizer: Any, model: Any, way: str, **options: Any
) -> tuple[list[int], list[int]]:
    """Return a text, and how it is gone on with; all of it is in the caches."""
    caches = make_prompt_cache(model)
    if way == "window":
        caches = [RotatingKVCache(12, 4) for _ in model.layers]
    options = {**OPTIONS[way], "prompt_cache": caches, "max_tokens": 24, **options}
    text = mlx_distill.stream_generate(model, tokenizer, TEXT, **options)
    tokens = [response.token for response in text]
    options = {"prompt_cache": caches, "max_tokens": 5}
    later = mlx_distill.stream_generate(model, tokenizer, [7], **options)
    end = [response.token for response in later]
    assert {cache.offset for cache in caches} == {len(TEXT) + 24 + 1 + 5}
    return tokens, end


@pytest.mark.parametrize("way", OPTIONS)
def test_parking_changes_no_text(
    tokenizer: Any, known: tuple[Any, KnowingDrafter], way: str
) -> None:
    model, drafter = known
    expected = text_and_end(tokenizer, model, way)
    for planner in (Parked(), EverySecond(), Resting()):
        found = text_and_end(tokenizer, model, way, drafter=drafter, plan=planner)
        assert found == expected, planner


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
@pytest.mark.parametrize("plan", [Parked(), DraftPlan(2, 3)], ids=["parked", "drafted"])
def test_no_call_is_made_for_what_follows_the_last_token(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, plan: Any, max_tokens: int
) -> None:
    model, called = tiny_model("llama"), []
    target = Target.of(model)
    verify = target.verify
    monkeypatch.setattr(target, "verify", lambda *a: called.append(a) or verify(*a))
    options = {"drafter": KnowingDrafter(model, TEXT, 14), "plan": plan, "max_tokens": max_tokens}
    *_, last = mlx_distill.stream_generate(model, tokenizer, TEXT, **options)
    assert last.generation_tokens == max_tokens
    assert len(called) == last.target_calls


@pytest.mark.parametrize("plan", [Parked(), DraftPlan(2, 3)], ids=["parked", "drafted"])
def test_the_first_token_waits_for_a_plain_step_at_the_most(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, plan: Any
) -> None:
    """As mlx-lm's, it is handed out when the next step is on its way; never behind a draft."""
    model, called = tiny_model("llama"), []
    target = Target.of(model)
    verify = target.verify
    monkeypatch.setattr(target, "verify", lambda *a: called.append(a) or verify(*a))
    options = {"drafter": KnowingDrafter(model, TEXT, 40), "plan": plan, "max_tokens": 9}
    next(mlx_distill.stream_generate(model, tokenizer, TEXT, **options))
    assert [tree.tokens.size for tree, *_ in called] == ([1] if isinstance(plan, Parked) else [])


@pytest.mark.parametrize("num_tokens", [3, 6, 8])
def test_a_text_that_is_left_while_it_rests_is_what_the_cache_holds(
    tokenizer: Any, num_tokens: int
) -> None:
    model, planner = tiny_model("llama"), Resting()
    caches = make_prompt_cache(model)
    options = {"drafter": KnowingDrafter(model, TEXT, 40, hide=True), "plan": planner}
    texts = mlx_distill.stream_generate(model, tokenizer, TEXT, prompt_cache=caches, **options)
    tokens = [next(texts).token for _ in range(num_tokens)]
    texts.close()
    assert {cache.offset for cache in caches} == {len(TEXT) + num_tokens}
    plain = mlx_distill.stream_generate(model, tokenizer, TEXT, max_tokens=num_tokens + 3)
    later = mlx_distill.stream_generate(model, tokenizer, [7], prompt_cache=caches, max_tokens=3)
    again = mlx_distill.stream_generate(model, tokenizer, [*TEXT, *tokens, 7], max_tokens=3)
    assert tokens == [response.token for response in plain][:num_tokens]
    assert [one.token for one in later] == [one.token for one in again]


def test_a_rest_ends_with_the_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, planner = tiny_model("llama"), Resting()
    target = Target.of(model)
    stepper, roots = target.stepper, []

    def counting(taps: Any) -> Any:
        step = stepper(taps)
        return lambda root, caches: roots.append(root) or step(root, caches)

    monkeypatch.setattr(target, "stepper", counting)
    options = {"drafter": KnowingDrafter(model, TEXT, 40, hide=True), "plan": planner}
    *_, last = mlx_distill.stream_generate(model, tokenizer, TEXT, max_tokens=12, **options)
    assert last.generation_tokens == 12
    assert len(roots) == sum(planner.rests) > 0
    assert last.target_calls + last.accepted_tokens == 11
