"""Dispatches: graphs counted by hand, mlx-lm's plain step, and what drafting may send."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from half_models import REFERENCE
from mlx import nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill import benchmark, cli
from mlx_distill.benchmarking import dispatch_study
from mlx_distill.benchmarking.dispatch_study import (
    CycleCounter,
    as_a_gpu_has_it,
    by_phase,
    of_plain_step,
    of_target,
    of_tree_call,
    shape,
)
from mlx_distill.benchmarking.dispatches import as_sent_to_a_gpu
from mlx_distill.checkpoint import bundled
from mlx_distill.drafters import shortlist
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.speculation.generation import stream_generate
from mlx_distill.target.target import Target

BUNDLED = bundled("stories-14m-redrafter")
ROWS = mx.arange(64, dtype=mx.float32).reshape(8, 8)
HEADS = mx.arange(8 * 64, dtype=mx.float32).reshape(1, 8, 4, 16)  # (1, N, H, D)
APART = mx.contiguous(HEADS.transpose(0, 2, 1, 3))  # (1, H, N, D)
WEIGHT = mx.ones((16,))
OFFSETS = mx.arange(8)
mx.eval(ROWS, HEADS, APART, WEIGHT, OFFSETS)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is counted follow a short text: its length costs time, and no dispatches."""
    monkeypatch.setattr(dispatch_study, "CONTEXT", 16)


def written(x: mx.array) -> mx.array:
    x[1:3] = 0
    return x


def written_and_read() -> list[mx.array]:
    before = ROWS + 1
    after = before[:]
    after[1:3] = 0
    return [after, before.sum()]


def attended(num: int) -> mx.array:
    """Attend with some queries, and put the heads of a token side by side."""
    q = mx.tile(HEADS, (1, 2, 1, 1))[:, :num].transpose(0, 2, 1, 3)
    mx.eval(q)
    return mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)


def rotated(x: mx.array, offset: mx.array | int) -> mx.array:
    return mx.fast.rope(x, 16, traditional=False, base=1e4, scale=1.0, offset=offset)


def beside(x: mx.array) -> mx.array:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


GRAPHS: dict[str, tuple[int, Callable[[], object]]] = {
    "nothing": (0, lambda: ROWS),
    "views": (0, lambda: mx.broadcast_to(ROWS.T[None, ::2, 1:], (3, 4, 7)).squeeze()),
    "an operation that two others need": (3, lambda: [(y := ROWS + 1) * 2, mx.exp(y)]),
    "a constant": (1, lambda: 2 * ROWS),
    "a matrix product with a bias": (1, lambda: mx.addmm(ROWS[:1], ROWS, ROWS.T)),
    "one row": (1, lambda: ROWS[0]),
    "a softmax and a gather": (2, lambda: mx.softmax(ROWS, -1)[mx.array([1, 5])]),
    "one compiled function, twice": (2, lambda: nn.silu(nn.silu(ROWS))),
    "a compiled function with a sum in it": (3, lambda: summed(ROWS)),
    "three arrays joined": (3, lambda: mx.concatenate([ROWS, ROWS, ROWS])),
    "filled, counted, padded": (4, lambda: [mx.zeros((3, 3)), mx.arange(5), mx.pad(ROWS, 1)]),
    "an array that is written into": (2, lambda: written(ROWS + 1)),
    "one that is also read as it was": (4, written_and_read),
    "rows that lie together": (0, lambda: ROWS.reshape(4, 16).flatten()),
    "columns that do not": (1, lambda: ROWS.T.reshape(-1)),
    "a norm": (1, lambda: mx.fast.rms_norm(HEADS, WEIGHT, 1e-5)),
    "a norm of heads that lie apart": (2, lambda: mx.fast.rms_norm(heads(), WEIGHT, 1e-5)),
    "rotated tokens": (1, lambda: rotated(heads(), 3)),
    "rotated nodes": (1, lambda: rotated(HEADS.transpose(1, 2, 0, 3), OFFSETS)),
    "rotated nodes that lie apart": (2, lambda: rotated(APART.transpose(2, 1, 0, 3), OFFSETS)),
    "attention of eight": (2, lambda: beside(attended(8))),
    "attention of one": (1, lambda: beside(attended(1))),
    "attention of sixteen": (1, lambda: beside(attended(16))),
}


@mx.compile
def summed(x: mx.array) -> mx.array:
    return mx.exp((x * 2 + 1).sum(axis=0) + 1) * 2


def heads() -> mx.array:
    return HEADS.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_counted_by_hand(name: str) -> None:
    expected, build = GRAPHS[name]
    build()  # what is compiled is looked at when it is compiled
    with as_sent_to_a_gpu() as sent:
        sent.add(build())
    found = sent.count()
    assert found.total() == expected, found


def test_a_plain_step_counted_by_hand() -> None:
    """Of llama: what its file says, operation by operation."""
    model = tiny_model("llama", num_hidden_layers=2)
    attention = ["norm", "q", "k", "v", "turn q", "turn k", "keep k", "keep v", "attend", "o", "+"]
    layer = [*attention, "norm", "gate", "up", "silu and product", "down", "+"]
    step = ["embed", *layer, *layer, "norm", "head", "logsumexp", "-", "argmax"]
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))
    with as_sent_to_a_gpu() as sent:
        list(generate_step(mx.array([5]), model, max_tokens=0, prompt_cache=caches))
    assert sent.count().total() == len(step)


def test_names_come_back() -> None:
    """Also when what is built fails."""
    before = (mx.eval, mx.async_eval, mx.default_device, mx.fast.rope, mx.array.reshape)
    with pytest.raises(ValueError, match="Received 2 axes"), as_sent_to_a_gpu():
        mx.array(1).transpose(0, 1)
    assert before == (mx.eval, mx.async_eval, mx.default_device, mx.fast.rope, mx.array.reshape)


@pytest.mark.parametrize(("kind", "layers"), [("llama", 2), ("qwen3", 2)])
def test_a_call_on_a_tree_costs_little_more_than_a_plain_step(kind: str, layers: int) -> None:
    """What a tree adds does not grow with the layers, beside what mlx-lm does for several rows."""
    few, more = (of_target(shape(kind, num)) for num in (layers, 2 * layers))
    extra = [found["target_call_8"] - found["mlx_lm_rows_8"] for found in (few, more)]
    assert extra[0] == extra[1]
    assert more["target_call_8"] <= 1.1 * more["plain_step"] + 12


def test_a_norm_of_heads_costs_a_tree_no_copies() -> None:
    """Of gemma's whole depth, since mlx-lm's own call of several rows copies twice per layer."""
    model = shape("gemma3_text")
    assert of_tree_call(model, 8) <= 1.1 * of_plain_step(model) + 12


def test_a_fast_call_of_a_draft_is_one_operation() -> None:
    """As on a GPU; its inputs, and what is made of it, are counted beside it."""
    counter, x = CycleCounter(), ROWS + 1
    mx.eval(x)
    norm = mx.fast.rms_norm
    with counter.watching():
        for name in ("draft", "target"):
            with counter.phase(name, ()) as made:
                made(mx.fast.rms_norm(x * 2, None, 1e-5) + 1)
    assert (counter.found["draft"], counter.found["target"]) == (3, 0)
    assert mx.fast.rms_norm is norm


def test_a_norm_in_something_compiled_is_one_operation() -> None:
    """A processor computes it by several, and they are one kernel of a GPU there, too."""
    counter, x = CycleCounter(), ROWS + 1
    mx.eval(x)
    with counter.watching(), counter.phase("draft", ()) as made:
        made(mx.compile(lambda x: mx.fast.rms_norm(x * 2, None, 1e-5) @ ROWS + 1)(x))
    assert counter.found["draft"] == 4


@pytest.mark.parametrize(("blocks", "most"), [(0, 39), (1, 89)])
def test_a_draft_is_counted_as_a_gpu_has_it(
    blocks: int, most: int, bundled_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is compiled there, and no shortlist stands before the head."""
    monkeypatch.setattr(shortlist, "DIRECTIONS", 4)
    monkeypatch.setattr(shortlist, "LISTED", 8)
    model, tokenizer = bundled_pair
    target = Target.of(model)
    shape = RecurrentDrafterConfig(
        *(target.hidden_size, target.vocab_size, target.hidden_size, 1),
        cell="gru",
        context_state=True,
        taps=(0, 1),
        context_blocks=blocks,
        context_heads=4,
    )
    network = RecurrentDrafter(shape if blocks else shape.without_blocks)
    mx.eval(network.parameters())
    drafter = BoundDrafter(network, target.embed, {})
    plan, prompt = DraftPlan(4, 4, 8), list(range(5, 21))
    drafter = as_a_gpu_has_it(drafter)
    steps = stream_generate(model, tokenizer, prompt, drafter=drafter, plan=plan, max_tokens=8)
    found = by_phase(steps)
    assert found["draft"] <= most


@pytest.mark.parametrize(("drafter", "most"), [(REFERENCE, 33), (BUNDLED, 40)])
def test_the_command(
    drafter: Path,
    most: int,
    whole_pair: tuple[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch_study, "TEXT_TOKENS", 8)
    output = tmp_path / "dispatches.json"
    monkeypatch.setattr(dispatch_study, "NODES", (8,))
    monkeypatch.setattr(cli, "load_model", lambda arguments: whole_pair)
    pair = ["--model", str(bundled("stories-14m")), "--drafter", str(drafter)]
    pair += ["--num-prompts", "1"]
    assert benchmark.main([*pair, "--dispatches", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert {"commit", "machine", "versions", "config"} <= set(found)
    (target,) = found["targets"]
    assert target["plain_step"] == 17 * 8 + 6
    assert target["target_call_8"] <= 1.1 * target["plain_step"] + 12
    assert f"{found['cycles']['greedy']['rest']:.1f}" in capsys.readouterr().out
    kernels = found["with_kernels"]
    for law, parts in kernels["cycles"].items():
        assert found["cycles"][law]["draft"] <= most
        plain = sum(found["cycles"][law].values()) + target["target_call_8"]
        assert sum(parts.values()) + kernels["target_call"] <= 0.6 * plain


def test_nothing_is_read_behind_a_table_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_study, "CONTEXT", 128)
    model, farthest = tiny_model("gpt2", n_positions=64, n_ctx=64), []

    class Table(nn.Embedding):
        def __call__(self, ids: mx.array) -> mx.array:
            farthest.append(ids.max())
            return super().__call__(ids)

    table = Table(64, model.args.n_embd)
    table.weight = model.model.wpe.weight
    model.model.wpe = table
    of_target(model)
    assert max(one.item() for one in farthest) < 64
