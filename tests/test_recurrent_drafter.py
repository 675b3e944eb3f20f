"""The recurrent drafter's network against its formulas, its names and its configuration."""

from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from oracles.recurrent_drafter import slow_logits
from oracles.sampling import softmax

from mlx_distill.core.draft import Draft
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.protocol import DraftPlan, Features
from mlx_distill.drafters.recurrent import (
    SHARPNESS,
    RecurrentDrafter,
    RecurrentDrafterConfig,
)
from mlx_distill.drafters.stepping import Steps
from mlx_distill.errors import InputError
from mlx_distill.kernels import exponentials

# Width 7 of the head needs a projection, width 10 = 2 x 5 does not.
SHAPES = [
    {"exit_dim": exit_dim, "num_draft_layers": layers, "rnn": rnn}
    for exit_dim, layers, rnn in product((7, 10), (0, 1, 2), (True, False))
]
SHAPES += [
    {"exit_dim": 7, "num_draft_layers": 1, "cell": "gru"},
    {"exit_dim": 7, "num_draft_layers": 1, "context_state": True},
    {"exit_dim": 10, "num_draft_layers": 0, "cell": "gru", "context_state": True},
    {"exit_dim": 5, "num_draft_layers": 1, "cell": "gru", "context_state": True, "taps": (0, 2)},
    {"exit_dim": 7, "num_draft_layers": 2, "head_rank": 3},
    {"exit_dim": 10, "num_draft_layers": 0, "head_rank": 2},
]
OTHER_EMBEDDING = {"exit_dim": 7, "num_draft_layers": 1, "embedding_size": 3}
TRIMMED = {"exit_dim": 7, "num_draft_layers": 1, "draft_vocab_size": 4}


def random_drafter(seed: int = 0, **shape: Any) -> RecurrentDrafter:
    """Return a drafter for hidden states of 5 and 11 tokens with random weights."""
    random = np.random.default_rng(seed)
    network = RecurrentDrafter(RecurrentDrafterConfig(hidden_size=5, vocab_size=11, **shape))
    weights = [
        (name, mx.array(0.6 * random.normal(size=value.shape).astype(np.float32)))
        for name, value in tree_flatten(network.trainable_parameters())
    ]
    network.load_weights(weights, strict=False)
    return network


def parameters(network: RecurrentDrafter) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(network.parameters())}


def random_inputs(network: RecurrentDrafter, *leading: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states (..., 5) and the embeddings of six tokens (..., 6, E)."""
    random = np.random.default_rng(1)
    width = network.config.embedding_size or network.config.hidden_size
    hidden = random.normal(size=(*leading, 5))
    embeddings = random.normal(size=(*leading, 6, width))
    return hidden.astype(np.float32), embeddings.astype(np.float32)


def taps_of(network: RecurrentDrafter, hidden: np.ndarray) -> list[np.ndarray]:
    """Return made-up outputs of the tapped layers, each of another size."""
    return [(hidden[..., ::-1] + 1) * 10.0**place for place in range(len(network.config.taps))]


def logits_after_each(
    network: RecurrentDrafter, hidden: np.ndarray, embeddings: np.ndarray
) -> np.ndarray:
    """Return the network's logits after one, two, ... tokens, (..., T, K)."""
    joined = network.joined(mx.array(hidden), [mx.array(x) for x in taps_of(network, hidden)])
    context = network.context(joined)
    state, logits = network.begin(joined), []
    for place in range(embeddings.shape[-2]):
        state = network.advance(state, network.read(mx.array(embeddings[..., place, :])))
        logits.append(network.logits(context, state))
    return np.array(mx.stack(logits, axis=-2))


def slow_logits_after_each(
    network: RecurrentDrafter, hidden: np.ndarray, embeddings: np.ndarray
) -> np.ndarray:
    rows = [
        slow_logits(
            parameters(network),
            hidden,
            embeddings[: place + 1],
            network.config.rnn,
            taps_of(network, hidden),
        )
        for place in range(len(embeddings))
    ]
    return np.array(rows)


# The formulas


@pytest.mark.parametrize("shape", [*SHAPES, OTHER_EMBEDDING, TRIMMED], ids=str)
def test_the_network_equals_its_formulas(shape: dict[str, Any]):
    network = random_drafter(**shape)
    hidden, embeddings = random_inputs(network)
    expected = slow_logits_after_each(network, hidden, embeddings)
    assert expected.shape == (6, shape.get("draft_vocab_size", 11))
    found = logits_after_each(network, hidden, embeddings)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, OTHER_EMBEDDING], ids=str)
def test_leading_axes_are_independent_drafts(shape: dict[str, Any]):
    network = random_drafter(**shape)
    hidden, embeddings = random_inputs(network, 2, 3)
    found = logits_after_each(network, hidden, embeddings)
    for place in np.ndindex(2, 3):
        expected = slow_logits_after_each(network, hidden[place], embeddings[place])
        np.testing.assert_allclose(found[place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_context_serves_several_states(shape: dict[str, Any]):
    network = random_drafter(**shape)
    hidden, embeddings = random_inputs(network, 4)
    taps = [mx.array(x) for x in taps_of(network, hidden[0])]
    joined = network.joined(mx.array(hidden[0]), taps)[None]
    context = network.context(joined)
    state = network.advance(network.begin(joined), network.read(mx.array(embeddings[:, 0])))
    found = np.array(network.logits(context, state))
    for row in range(4):
        expected = slow_logits_after_each(network, hidden[0], embeddings[row, :1])[0]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[False, True], ids=["own exponentials", "powers"])
def _exponentials(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials are MLX's own, or powers, whatever a probe would find."""
    monkeypatch.setattr(exponentials, "by_powers", lambda: request.param)


@pytest.mark.usefixtures("_exponentials")
@pytest.mark.parametrize("table_bytes", [0, 2**20])
@pytest.mark.parametrize("shape", [*SHAPES, OTHER_EMBEDDING, TRIMMED], ids=str)
def test_joined_steps_equal_the_network(shape: dict[str, Any], table_bytes: int):
    """With tables and without: features after the root, and after one more token."""
    network = random_drafter(**shape)
    tokens = network.config.draft_vocab_size or network.config.vocab_size
    embed = nn.Embedding(network.config.vocab_size, network.config.embedding_size or 5)
    hidden, column = mx.random.normal((5,)), tokens - 1
    token = network.token_ids[column].item() if "token_ids" in network else column
    steps = Steps(network, embed)
    steps.tabulate(table_bytes)
    context = steps.context(hidden[None])
    x, carried = steps.first(mx.array([1]), context)
    y, _ = steps.next(mx.array([column]), carried, context)
    state = network.advance(network.begin(hidden), network.read(embed(mx.array([1]))))
    expected = network.features(network.context(hidden)[None], state)
    np.testing.assert_allclose(np.array(x), np.array(expected), rtol=1e-4, atol=1e-5)
    state = network.advance(state, network.read(embed(mx.array([token]))))
    expected = network.features(network.context(hidden)[None], state)
    np.testing.assert_allclose(np.array(y), np.array(expected), rtol=1e-4, atol=1e-5)


# The names of the parameters


def expected_names(
    exit_dim: int, num_draft_layers: int, rnn: bool = True, **others: Any
) -> set[str]:
    """Return the names of a shape's parameters."""
    names = {f"lm_head.{num_draft_layers}.weight"}
    for layer in range(num_draft_layers):
        names |= {f"lm_head.{layer}.linear.{kind}" for kind in ("weight", "bias")}
    if exit_dim != 10:
        names |= {"input_proj.weight", "input_proj.bias"}
    if rnn:
        names |= {"rnn_u.weight", "rnn_u.bias", "rnn_w.weight"}
    if "draft_vocab_size" in others:
        names.add("token_ids")
    if "context_state" in others:
        names |= {"first_state.weight", "first_state.bias"}
    if "taps" in others:
        names.add("tap_proj.weight")
    if "head_rank" in others:
        names.add(f"lm_head.{num_draft_layers + 1}.weight")
    return names


@pytest.mark.parametrize("shape", [*SHAPES, OTHER_EMBEDDING, TRIMMED], ids=str)
def test_parameters_have_the_names_of_published_checkpoints(shape: dict[str, Any]):
    network = random_drafter(**shape)
    assert parameters(network).keys() == expected_names(**shape)
    trained = dict(tree_flatten(network.trainable_parameters())).keys()
    assert trained == expected_names(**shape) - {"token_ids"}


def test_parameters_have_the_published_shapes():
    shapes = {
        name: value.shape for name, value in parameters(random_drafter(**OTHER_EMBEDDING)).items()
    }
    assert shapes == {
        "input_proj.weight": (7, 10),
        "input_proj.bias": (7,),
        "lm_head.0.linear.weight": (7, 7),
        "lm_head.0.linear.bias": (7,),
        "lm_head.1.weight": (11, 7),
        "rnn_u.weight": (5, 5),
        "rnn_u.bias": (5,),
        "rnn_w.weight": (5, 3),
    }


# The drafter bound to a target


@pytest.mark.parametrize("shape", [{}, *SHAPES[-4:]], ids=str)
def test_the_first_drafted_tokens_are_the_networks_best(shape: dict[str, Any]):
    network = random_drafter(**{**TRIMMED, **shape})
    network.token_ids = mx.array([2, 3, 7, 10])
    embed = nn.Embedding(11, 5)
    hidden = random_inputs(network)[0]
    read = np.array(embed.weight)[[6]]
    probs = softmax(SHARPNESS * slow_logits_after_each(network, hidden, read)[0])
    drafter = BoundDrafter(network, embed, {"hidden_size": 5})
    rows = [mx.array(np.stack([0 * hidden, row])) for row in (hidden, *taps_of(network, hidden))]
    state = drafter.open(mx.array([1, 2]), Features(rows[0], None, tuple(rows[1:])))
    draft = state.draft(mx.array([6]), DraftPlan(2, 1), None)
    assert draft is not None
    best = np.argsort(-probs)[:2]
    scores = dict(zip(draft.tokens[1:].tolist(), draft.scores[1:].tolist(), strict=True))
    expected = {[2, 3, 7, 10][column]: np.log(probs[column]) for column in best}
    assert scores == pytest.approx(expected, abs=1e-5)
    assert drafter.config is network.config


@pytest.mark.usefixtures("_exponentials")
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES[:4], *SHAPES[-4:], OTHER_EMBEDDING, TRIMMED], ids=str)
def test_drafts_made_at_once_are_those_made_one_by_one(shape: dict[str, Any], noisy: bool):
    network = random_drafter(**shape)
    if "token_ids" in network:
        network.token_ids = mx.array([2, 3, 7, 10])
    embed = nn.Embedding(11, network.config.embedding_size or 5)
    drafter = BoundDrafter(network, embed, {"hidden_size": 5})
    hidden = random_inputs(network, 4)[0]
    taps = tuple(mx.array(hidden * (2 + layer)) for layer in range(len(network.config.taps)))
    roots, plan = mx.array([6, 1, 6, 9]), DraftPlan(3, 4)
    noise = mx.random.gumbel((7, 11), key=mx.random.key(4)) if noisy else None
    features = Features(mx.array(hidden), None, taps)
    found = drafter.draft_everywhere(roots, features, plan, noise)
    for row in range(4):
        seen = None if noise is None else noise[row : row + 4]
        there = mx.stack([tap[row] for tap in taps]) if taps else None
        one = drafter.draft(mx.array(hidden[row]), roots[row : row + 1], plan, seen, there)
        at_once = Draft(*(x[row] for x in fields_of(found)), found.max_depth)
        assert paths(at_once) == pytest.approx(paths(one), abs=1e-4)


def fields_of(draft: Draft) -> tuple[mx.array, ...]:
    return draft.tokens, draft.parents, draft.depths, draft.scores


def paths(draft: Draft) -> dict[tuple[int, ...], float]:
    """Return the score of every path, as tokens from the root on."""
    tokens, parents, _, scores = (x.tolist() for x in fields_of(draft))
    found = {0: (tokens[0],)}
    for node in range(1, len(tokens)):
        found[node] = (*found[parents[node]], tokens[node])
    return {path: scores[node] for node, path in found.items()}


# The configuration

FIELDS = {"hidden_size": 5, "vocab_size": 11, "exit_dim": 7, "num_draft_layers": 1}


def test_a_configuration_is_read_from_a_dictionary():
    assert RecurrentDrafterConfig.from_dict(FIELDS) == RecurrentDrafterConfig(5, 11, 7, 1)
    config = RecurrentDrafterConfig.from_dict(
        {**FIELDS, "rnn": True, "embedding_size": 3, "draft_vocab_size": 11}
    )
    assert (config.rnn, config.embedding_size, config.draft_vocab_size) == (True, 3, 11)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"vocab_size": -3}, "vocab_size must be at least 1, got -3"),
        ({"exit_dim": 2.5}, "exit_dim must be a whole number, got 2.5"),
        ({"exit_dim": "7"}, "exit_dim must be a whole number, got '7'"),
        ({"embedding_size": "x"}, "embedding_size must be a whole number, got 'x'"),
        ({"rnn": "no"}, "rnn must be true or false, got 'no'"),
        ({"cell": "lstm"}, "cell must be elman or gru, got lstm"),
        (
            {"rnn": False, "cell": "gru"},
            "a drafter without rnn has neither a cell nor a first state",
        ),
        ({"num_draft_layers": -1}, "num_draft_layers must be at least 0, got -1"),
        (
            {"num_draft_layers": None},
            "num_draft_layers must be a whole number, got None",
        ),
        (
            {"draft_vocab_size": 0},
            "draft_vocab_size must be at least 1, got 0",
        ),
        (
            {"draft_vocab_size": 12},
            "draft_vocab_size must be at most the vocabulary's 11, got 12",
        ),
        (
            {"rnn": False, "embedding_size": 3},
            "a drafter without rnn needs embeddings as wide as the hidden states",
        ),
        ({"width": 3, "depth": 2}, "the drafter's config has unknown fields: depth, width"),
    ],
)
def test_a_wrong_field_is_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(InputError, match=f"^{sentence}$"):
        RecurrentDrafterConfig.from_dict({**FIELDS, **changes})


def test_missing_fields_are_named():
    sentence = "^the drafter's config lacks the fields: vocab_size, exit_dim$"
    with pytest.raises(InputError, match=sentence):
        RecurrentDrafterConfig.from_dict({"hidden_size": 5, "num_draft_layers": 1})


@pytest.mark.parametrize("name", ["beam_width", "draft_length", "nodes"])
def test_an_empty_plan_is_refused(name: str):
    with pytest.raises(InputError, match=f"^{name} must be at least 1, got 0$"):
        DraftPlan(**{name: 0})


def test_an_unknown_tree_is_refused():
    with pytest.raises(InputError, match=r"^tree must be best-first, beam or static, got oak$"):
        DraftPlan(tree="oak")
