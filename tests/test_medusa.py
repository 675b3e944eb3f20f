"""Medusa heads: their formulas, their drafts, their folders, and what they learn."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from damage import Edit, Run, changed, edit_arrays, set_fields
from half_models import REFERENCE
from mlx.utils import tree_flatten
from oracles.beam_search import slow_beam_search
from oracles.medusa_heads import slow_head_logits
from oracles.sampling import softmax

import mlx_distill
from mlx_distill import DraftPlan, InputError, benchmark, train_drafter
from mlx_distill.core.draft import Draft
from mlx_distill.drafters.fingerprint import fingerprint
from mlx_distill.drafters.folders import save_drafter
from mlx_distill.drafters.medusa import MedusaConfig, MedusaHeads
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.drafters.protocol import DraftsEverywhere, Features
from mlx_distill.target.target import Target

TRIMMED = [2, 3, 5, 7, 8, 10]
SHAPES: list[dict[str, Any]] = [
    {"num_draft_layers": layers, "shared_head": shared}
    for layers, shared in product((0, 1, 2), (True, False))
]
SHAPES += [
    {"taps": (0, 2)},
    {"draft_vocab_size": 6},
    {"draft_vocab_size": 6, "shared_head": False, "taps": (1,)},
]


def random_heads(seed: int = 0, **shape: Any) -> MedusaHeads:
    """Return three heads with random weights for hidden states of 5 and 11 tokens."""
    random = np.random.default_rng(seed)
    network = MedusaHeads(
        MedusaConfig(**{"hidden_size": 5, "vocab_size": 11, "num_heads": 3, **shape})
    )
    weights = [
        (name, mx.array(0.6 * random.normal(size=value.shape).astype(np.float32)))
        for name, value in tree_flatten(network.trainable_parameters())
    ]
    network.load_weights(weights, strict=False)
    if "token_ids" in network:
        network.token_ids = mx.array(TRIMMED)
    return network


def parameters(network: MedusaHeads) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(network.parameters())}


def seen_by(network: MedusaHeads, *leading: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return hidden states (..., 5), and made-up outputs of the tapped layers."""
    hidden = np.random.default_rng(1).normal(size=(*leading, 5)).astype(np.float32)
    taps = range(len(network.config.taps))
    return hidden, [(hidden[..., ::-1] + 1) * 10.0**place for place in taps]


# The formulas


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_heads_equal_their_formulas(shape: dict[str, Any]):
    network = random_heads(**shape)
    known = parameters(network)
    hidden, taps = seen_by(network, 4)
    rows = network.unrolled(mx.array(hidden), [mx.array(x) for x in taps], mx.zeros((4, 2, 1)))
    for row, number in np.ndindex(4, 2):
        expected = slow_head_logits(known, number, hidden[row], [tap[row] for tap in taps])
        assert len(expected) == shape.get("draft_vocab_size", 11)
        head = network.heads[0 if network.config.shared_head else number]
        np.testing.assert_allclose(head(rows[row, number]), expected, rtol=1e-4, atol=1e-4)


def test_new_heads_say_what_the_target_does():
    network = MedusaHeads(MedusaConfig(5, 11, num_heads=2, num_draft_layers=2))
    hidden = mx.array(seen_by(network, 3)[0])
    features = network.unrolled(hidden, [], mx.zeros((3, 2, 1)))
    assert mx.array_equal(features, mx.broadcast_to(hidden[:, None], (3, 2, 5)))


# Drafts


def paths(draft: Draft, row: int | None = None) -> dict[tuple[int, ...], float]:
    """Return the score of every path, as tokens from the root on."""
    fields = (draft.tokens, draft.parents, draft.depths, draft.scores)
    tokens, parents, _, scores = ((x if row is None else x[row]).tolist() for x in fields)
    found = {0: (tokens[0],)}
    for node in range(1, len(tokens)):
        found[node] = (*found[parents[node]], tokens[node])
    return {path: scores[node] for node, path in found.items()}


def slow_paths(
    network: MedusaHeads, hidden: np.ndarray, taps: list[np.ndarray], noise: np.ndarray | None
) -> dict[tuple[int, ...], float]:
    """Return the paths of beams of 4 x 3 behind the token 6."""
    tokens = TRIMMED if "token_ids" in network else list(range(11))

    def log_probs(path: tuple[int, ...]) -> np.ndarray:
        logits = slow_head_logits(parameters(network), len(path), hidden, taps)
        seen = 0 if noise is None else noise[len(path)][tokens]
        return np.log(softmax(network.config.sharpness * (logits + seen)))

    levels = slow_beam_search(log_probs, 4, 3, tokens)
    return {(6,): 0.0} | {(6, *path): score for one in levels for path, score in one.items()}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drafts_hold_the_likeliest_products(shape: dict[str, Any], noisy: bool):
    """No deeper than there are heads, whatever is asked for; at once as one by one."""
    network = random_heads(**shape)
    hidden, taps = seen_by(network, 2)
    noise = np.random.default_rng(3).gumbel(size=(6, 11)).astype(np.float32) if noisy else None
    drafter, plan = MedusaDrafter(network, {"hidden_size": 5}), DraftPlan(4, 5)
    rows = [mx.array(x) for x in (hidden, *taps)]
    state = drafter.open(mx.array([1]), Features(0 * rows[0], None, tuple(0 * x for x in rows[1:])))
    state.accept(mx.array([1, 2]), Features(rows[0], None, tuple(rows[1:])))
    seen = None if noise is None else mx.array(noise[1:])
    draft = state.draft(mx.array([6]), plan, seen)
    expected = slow_paths(
        network, hidden[1], [x[1] for x in taps], noise if noise is None else noise[1:]
    )
    assert paths(draft) == pytest.approx(expected, abs=1e-4)
    assert draft.max_depth == 3
    assert isinstance(drafter, DraftsEverywhere)
    features = Features(rows[0], None, tuple(rows[1:]))
    noises = None if noise is None else mx.array(noise)
    every = drafter.draft_everywhere(mx.array([6, 6]), features, plan, noises)
    assert paths(every, 1) == pytest.approx(expected, abs=1e-4)
    first = slow_paths(network, hidden[0], [x[0] for x in taps], noise)
    assert paths(every, 0) == pytest.approx(first, abs=1e-4)


HIT_RATES = ((0.5, 0.2, 0.1), (0.4, 0.1, 0.05), (0.3, 0.1, 0.0))
STATIC = DraftPlan(1, 3, 7, "static")  # of the likeliest six paths


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:3] + SHAPES[-1:], ids=str)
def test_static_trees_hold_the_choices_that_are_right_most_often(
    shape: dict[str, Any], noisy: bool
):
    network = random_heads(hit_rates=HIT_RATES, **shape)
    hidden, taps = seen_by(network, 2)
    noise = np.random.default_rng(3).gumbel(size=(6, 11)).astype(np.float32) if noisy else None
    drafter = MedusaDrafter(network, {"hidden_size": 5})
    features = Features(mx.array(hidden), None, tuple(map(mx.array, taps)))
    later = None if noise is None else mx.array(noise[1:])
    draft = drafter.open(mx.array([1]), features).draft(mx.array([6]), STATIC, later)
    tokens = np.array(TRIMMED if "token_ids" in network else range(11))
    best = []
    for number in range(3):
        logits = slow_head_logits(parameters(network), number, hidden[1], [x[1] for x in taps])
        seen = 0 if noise is None else noise[1 + number][tokens]
        best.append(tokens[np.argsort(-(logits + seen))])
    chosen = [(0,), (0, 0), (1,), (1, 0), (2,), (0, 0, 0)]
    expected = {(6, *(best[head][one] for head, one in enumerate(path))) for path in chosen}
    assert paths(draft).keys() == expected | {(6,)}
    everywhere = None if noise is None else mx.array(noise)
    every = drafter.draft_everywhere(mx.array([6, 6]), features, STATIC, everywhere)
    assert paths(every, 1) == pytest.approx(paths(draft))


def test_without_hit_rates_there_is_no_static_tree(bundled_pair: Any, bundled_drafter: Any) -> None:
    options: dict[str, Any] = {"plan": STATIC, "drafter": bundled_drafter}
    with pytest.raises(InputError, match="a static tree is made of Medusa heads whose hit rates"):
        mlx_distill.generate(*bundled_pair, "Once", **options)


# Folders


@pytest.fixture(scope="module", params=[True, False])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundled_pair: Any
) -> Path:
    """Return a folder of random heads for the bundled model, with one matrix or one each."""
    shape = {"shared_head": request.param, "draft_vocab_size": 512, "taps": (1, -1)}
    shape["hit_rates"] = HIT_RATES
    network = MedusaHeads(MedusaConfig(384, 4096, num_heads=3, **shape))
    known = fingerprint(Target.of(bundled_pair[0]), bundled_pair[1])
    where = tmp_path_factory.mktemp("heads") / "heads"
    save_drafter(where, network, known, {"README.md": "# heads"})
    return where


SHORT: dict[str, Any] = {"max_tokens": 10}
LAWS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]


@pytest.fixture(scope="module")
def plain_texts(bundled_pair: Any) -> list[str]:
    """Return what the target writes by itself."""
    return [mlx_distill.generate(*bundled_pair, "Once upon a time", **SHORT, **law) for law in LAWS]


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("bits", [None, 4])
def test_folders_are_read_and_the_text_is_the_targets(
    tmp_path: Path, bundled_pair: Any, folder: Path, plain_texts: list[str], bits: int | None
) -> None:
    whole: Any = mlx_distill.load_drafter(folder, *bundled_pair)
    if bits:
        mlx_distill.quantize_drafter(folder, tmp_path / "small", bits)
    drafter: Any = mlx_distill.load_drafter(tmp_path / "small" if bits else folder, *bundled_pair)
    assert drafter.config == whole.config
    values = dict(tree_flatten(whole.network.parameters()))
    for name, array in tree_flatten(drafter.network.parameters()):
        step = (values[name].max() - values[name].min()).item() / 15 if bits else 0
        assert mx.abs(array - values[name]).max().item() <= step
    for shape in ({}, {"plan": STATIC}):
        options: dict[str, Any] = {"drafter": drafter, **SHORT, **shape}
        texts = [
            mlx_distill.generate(*bundled_pair, "Once upon a time", **options, **law)
            for law in LAWS
        ]
        assert texts == plain_texts


def arrays_with(name: str, change: Callable[[mx.array], mx.array]) -> dict[str, Edit]:
    """Return the edits of a folder that change one array."""
    return {"model__safetensors": edit_arrays(lambda x: x.update({name: change(x[name])}))}


REFUSED: list[tuple[dict[str, Edit], str]] = [
    ({"config__json": set_fields(hidden_size=192)}, "blocks.0.0.linear.weight"),
    ({"config__json": set_fields(num_heads=70)}, "num_heads must be between 1 and 64, got 70"),
    (
        {"config__json": set_fields(num_heads=20, hit_rates=[])},
        "num_heads is 20, which no array there has",
    ),
    ({"config__json": set_fields(num_draft_layers=10)}, "does not fit its config"),
    ({"config__json": set_fields(exit_dim=384)}, "the drafter's config has unknown fields: exit_"),
    ({"config__json": set_fields(hit_rates=[[0.5]])}, "hit_rates must hold as many shares"),
    ({"config__json": set_fields(hit_rates=[[0.5], [0.2], [2]])}, "hit_rates must hold as many"),
    ({"config__json": set_fields(hit_rates=[[0.5], [0.2], [0.1, 0]])}, "hit_rates must hold as"),
    (
        {
            "model__safetensors": edit_arrays(
                lambda x: x.update({"blocks.1.0.linear.bias": mx.full(384, mx.nan)})
            )
        },
        "blocks.1.0.linear.bias holds values that are no finite numbers",
    ),
    (
        {
            "model__safetensors": edit_arrays(
                lambda x: x.update({"token_ids": x["token_ids"] + 4000})
            )
        },
        "token_ids must lie in the vocabulary of 4096",
    ),
]


@pytest.mark.parametrize(("edits", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, bundled_pair: Any, folder: Path, edits: dict[str, Edit], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence.replace("[", r"\[")):
        mlx_distill.load_drafter(changed(folder, tmp_path / "bad", **edits), *bundled_pair)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 64}, "hidden size is 64"),
        ({"tokenizer_hash": "ab"}, "tokenizer hash is ab"),
    ],
)
def test_heads_of_another_target_are_refused(
    tmp_path: Path, bundled_pair: Any, folder: Path, change: dict[str, Any], sentence: str
) -> None:
    target = json.loads((folder / "config.json").read_text())["target"] | change
    other = changed(folder, tmp_path / "other", config__json=set_fields(target=target))
    with pytest.raises(InputError, match=f"made for another target: its {sentence}"):
        mlx_distill.load_drafter(other, *bundled_pair)


# Training

TINY = [
    *(
        "--drafter-kind",
        "medusa",
        "--draft-vocab-size",
        "256",
        "--unroll",
        "3",
        "--batch-size",
        "2",
    ),
    *("--max-tokens", "8", "--held-out", "2", "--steps", "8", "--checkpoint-every", "8"),
    *("--max-prompts", "6", "--prompt-tokens", "6", "--response-batch-size", "2"),
    *("--evaluate-every", "4", "--seed", "4", "--learning-rate", "0.01"),
]


@pytest.mark.usefixtures("not_compiled")
def test_heads_are_trained_and_used(tmp_path: Path, tiny_on_a_gpu: Path) -> None:
    """With weights as a GPU loads them, in every type; from prompts to a text."""
    model, heads = ["--model", str(tiny_on_a_gpu)], str(tmp_path / "heads")
    data = ["--data", str(benchmark.PROMPTS)]
    assert train_drafter.main([*model, *data, "--output", heads, *TINY]) == 0
    pair = mlx_distill.load(tiny_on_a_gpu)
    drafter: Any = mlx_distill.load_drafter(heads, *pair)
    embed = Target.of(pair[0]).embed
    assert embed is not None
    assert drafter.network.head.weight.dtype == embed(mx.array([0])).dtype
    log = json.loads((tmp_path / "heads/training.json").read_text())["log"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert "A drafter of Medusa heads, of " in (tmp_path / "heads/README.md").read_text()
    expected = mlx_distill.generate(*pair, "Once upon a time", max_tokens=12)
    for plan in (DraftPlan(4, 3, 8), DraftPlan(1, 3, 8, "static")):
        options: dict[str, Any] = {"drafter": drafter, "max_tokens": 12, "plan": plan}
        assert mlx_distill.generate(*pair, "Once upon a time", **options) == expected
    rates = np.array(drafter.config.hit_rates)
    assert rates.shape == (3, 8)
    np.testing.assert_allclose(rates[:, 0], log[-1]["acceptance_greedy"], atol=1e-4)
    assert (rates.sum(axis=1) <= 1.001).all()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--exit-dim", "32"], "Medusa heads have no exit_dim; leave it as it is"),
        (["--cell", "elman"], "Medusa heads have no cell"),
        (["--context-blocks", "1"], "Medusa heads have no context_blocks"),
        (["--unroll", "70"], "num_heads must be between 1 and 64, got 70"),
        (["--start-from", str(REFERENCE)], "has another shape: Recurrent"),
        (["--drafter-kind", "oak"], "drafter_kind must be recurrent or medusa, got oak"),
    ],
)
@pytest.mark.usefixtures("bundled_once")
def test_what_heads_are_not_is_refused(
    tmp_path: Path, refused: Run, flags: list[str], sentence: str
) -> None:
    data = ["--data", benchmark.PROMPTS, "--output", tmp_path / "heads"]
    said = refused(train_drafter.main, *data, *TINY, *flags, alone=False)
    assert sentence in said
    assert not list(tmp_path.iterdir())
