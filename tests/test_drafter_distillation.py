"""What the drafter learns, against a twin that takes one position and one draft step at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from oracles.recurrent_drafter import slow_logits
from oracles.sampling import softmax
from scipy.special import rel_entr

from mlx_distill.distillation import drafter as module
from mlx_distill.distillation.drafter import (
    Starts,
    TargetView,
    acceptance_by_depth,
    answer_places,
    drafter_loss,
    joined_views,
    rows_before,
    unroll,
)
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig

# The unrolled drafter

PROMPTS, LENGTHS = [3, 1, 5, 2], [12, 9, 6, 2]


WIDTH, VOCAB_SIZE, HIDDEN_SIZE = 12, 10, 5


TRIMMED = [1, 2, 5, 6, 9]


UNROLL = 4


FORMS = [
    {},
    {"cell": "gru", "context_state": True},
    {"cell": "gru", "context_state": True, "taps": (1, 2)},
]


def random_drafter(token_ids: list[int] | None = None, **shape: Any) -> RecurrentDrafter:
    """Return a drafter with random weights."""
    config = RecurrentDrafterConfig(
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        exit_dim=7,
        num_draft_layers=1,
        draft_vocab_size=token_ids and len(token_ids),
        **shape,
    )
    network = RecurrentDrafter(config)
    random = np.random.default_rng(0)
    weights = [
        (name, mx.array(0.8 * random.normal(size=value.shape).astype(np.float32)))
        for name, value in tree_flatten(network.trainable_parameters())
    ]
    return network.load_weights(weights, strict=False)


def random_batch() -> dict[str, np.ndarray]:
    """Return what a target says of four texts, padding included."""
    random = np.random.default_rng(1)
    return {
        "logits": 2 * random.normal(size=(4, WIDTH, VOCAB_SIZE)).astype(np.float32),
        "hidden": random.normal(size=(4, WIDTH, HIDDEN_SIZE)).astype(np.float32),
        "embeddings": random.normal(size=(4, WIDTH, HIDDEN_SIZE)).astype(np.float32),
    }


def rows_of(batch: dict[str, Any], mask: np.ndarray, before: int = 0) -> TargetView:
    """Return the view of the places of a mask; the target's "states" are its logits themselves."""
    found, ahead = answer_places(mask, before)
    logits, hidden, embeddings = (
        mx.array(batch[name]).reshape(4 * WIDTH, -1)[mx.array(found)]
        for name in ("logits", "hidden", "embeddings")
    )
    tokens = mx.arange(len(found))
    return TargetView(hidden, tokens, mx.array(ahead), logits, lambda ids: embeddings[ids])


def view_of(batch: dict[str, Any]) -> TargetView:
    """Return the view of the batch's answers."""
    mask = np.zeros((4, WIDTH), np.float32)
    for text, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        mask[text, prompt - 1 : length - 1] = 1
    return rows_of(batch, mask)


def starts_of(view: TargetView) -> Starts:
    """Return the drafts from everywhere."""
    return view.starts(mx.arange(view.tokens.size), UNROLL)


def head_of(token_ids: list[int] | None) -> Callable[[mx.array], mx.array]:
    """Return what makes the target's logits of what can be drafted."""
    return lambda rows: rows if token_ids is None else rows[..., mx.array(token_ids)]


def parameters_of(drafter: RecurrentDrafter) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(drafter.parameters())}


def slow_steps(
    parameters: dict[str, np.ndarray], batch: dict[str, np.ndarray], token_ids: list[int] | None
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return the depth, the target's and the drafter's probabilities of all that counts."""
    columns = range(VOCAB_SIZE) if token_ids is None else token_ids
    steps = []
    for text, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        for start in range(WIDTH):
            answers = prompt - 1 <= start and start + 1 < length
            for depth in range(1, UNROLL + 1):
                # A goal is where the target chose a token, too: not behind the text's last one.
                if not answers or start + depth + 1 >= length:
                    continue
                target = batch["logits"][text, start + depth, list(columns)].astype(np.float64)
                read = batch["embeddings"][text, start + 1 : start + depth + 1]
                student = slow_logits(parameters, batch["hidden"][text, start], read)
                steps.append((depth, softmax(target), softmax(student)))
    return steps


def slow_mixture(target: np.ndarray, student: np.ndarray) -> float:
    """Return the divergence, mixed with the share that is rejected."""
    accepted = np.minimum(target, student).sum()
    weight = np.exp(-3 * accepted)
    return weight * rel_entr(target, student).sum() + (1 - weight) * (1 - accepted)


def slow_loss(
    parameters: dict[str, np.ndarray],
    batch: dict[str, np.ndarray],
    token_ids: list[int] | None,
    decay: float,
    kind: str = "kl",
) -> tuple[float, float]:
    """Return the weighted sum of a loss and its count."""
    steps = slow_steps(parameters, batch, token_ids)
    weights = [decay ** (depth - 1) for depth, _, _ in steps]
    value = {"kl": lambda p, q: rel_entr(p, q).sum(), "lk": slow_mixture}[kind]
    terms = [value(target, student) for _, target, student in steps]
    return float(np.dot(weights, terms)), sum(weights)


def test_only_places_where_the_target_chose_a_token_are_taken():
    mask = np.zeros((3, 8))
    mask[0, 2:5] = mask[0, 6] = 1  # two turns
    mask[1, 6:] = 1  # ends with the batch; the next text begins with an answer
    mask[2, 0] = 1
    places, ahead = answer_places(mask)
    assert places.tolist() == [2, 3, 4, 6, 14, 15, 16]
    assert ahead.tolist() == [2, 1, 0, 0, 1, 0, 0]


def test_of_a_prompt_so_many_places_before_its_answer_are_kept():
    mask = np.zeros((3, 8))
    mask[0, 3:5] = mask[0, 6] = 1
    mask[1, 1:3] = 1
    places, ahead = answer_places(mask, before=2)
    assert places.tolist() == [1, 2, 3, 4, 6, 8, 9, 10]
    assert ahead.tolist() == [-1, -1, 1, 0, 0, -1, 1, 0]


def test_the_rows_of_the_texts_that_some_starts_are_in():
    """A window before the first start of a text, and at most to the text's begin."""
    begins = np.array([0, 10, 30])
    rows, behind, within = rows_before(np.array([14, 33, 5, 12, 31]), begins, window=4)
    expected = [*range(2, 6), *range(10, 15), *range(30, 34)]
    assert rows[: len(expected)].tolist() == expected
    assert rows[within].tolist() == [14, 33, 5, 12, 31]
    assert behind[: len(expected)].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert len(rows) == len(behind) == 1024


def test_contexts_of_starts_are_those_of_whole_texts():
    """With a prompt, and texts that stand side by side."""
    shape = {"cell": "gru", "context_state": True, "context_blocks": 2, "context_window": 4}
    drafter, batch = random_drafter(**shape), random_batch()
    mask = np.zeros((4, WIDTH), np.float32)
    for text, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        mask[text, prompt - 1 : length - 1] = 1
    view = rows_of(batch, mask, before=7)
    places = view.starting[mx.array([9, 2, 3, 12, 11])]
    starts = view.starts(places, UNROLL, window=8)
    assert starts.past is not None
    found = drafter.blocks(starts.hidden, *starts.past[:2])[starts.past.places]
    begins = [0, *(np.flatnonzero(np.array(view.ahead) == 0) + 1).tolist()]
    for context, place in zip(found, places.tolist(), strict=True):
        begin = max(one for one in begins if one <= place)
        rows = mx.array([*range(begin, place + 1), *[0] * ((begin - place - 1) % 4)])
        following = view.embed(mx.minimum(rows + 1, view.tokens.size - 1))
        expected = drafter.blocks(view.hidden[rows], following, mx.arange(rows.size))
        np.testing.assert_allclose(context, expected[place - begin], rtol=1e-4, atol=1e-5)
    logits = drafter.head(unroll(drafter, starts))
    bare = dataclasses.replace(drafter.config, context_blocks=0)
    plain = RecurrentDrafter(bare)
    plain.update({k: v for k, v in drafter.parameters().items() if k != "blocks"})
    alone = starts._replace(hidden=found, past=None)
    np.testing.assert_allclose(logits, plain.head(unroll(plain, alone)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_unrolled_logits_are_those_of_every_draft_alone(shape: dict[str, Any]):
    drafter, batch = random_drafter(**shape), random_batch()
    view = view_of(batch)
    taps = tuple(view.hidden * 10**place + 1 for place in range(len(drafter.config.taps)))
    starts = starts_of(dataclasses.replace(view, taps=taps))
    logits = np.array(drafter.head(unroll(drafter, starts)))
    embeddings = np.array(view.embed(view.tokens))
    for start, ahead in enumerate(np.array(view.ahead).tolist()):
        assert starts.mask[start].tolist() == [depth <= ahead for depth in range(1, UNROLL + 1)]
        for depth in range(1, min(ahead, UNROLL) + 1):
            read = embeddings[start + 1 : start + depth + 1]
            seen = [np.array(tap[start]) for tap in taps]
            hidden = np.array(view.hidden[start])
            expected = slow_logits(parameters_of(drafter), hidden, read, taps=seen)
            np.testing.assert_allclose(logits[start, depth - 1], expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(starts.goals[start, depth - 1], view.goals[start + depth])
    assert starts.mask.sum().item() > 20


@pytest.mark.parametrize(("kind", "decay"), [("kl", 0.8), ("kl", 1.0), ("lk", 1.0), ("lk", 0.3)])
@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_the_loss_equals_a_loop_over_positions(
    token_ids: list[int] | None, kind: str, decay: float
):
    drafter, batch = random_drafter(token_ids), random_batch()
    found = drafter_loss(drafter, starts_of(view_of(batch)), head_of(token_ids), decay, kind)
    expected = slow_loss(parameters_of(drafter), batch, token_ids, decay, kind)
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_acceptance_equals_a_loop_over_positions(token_ids: list[int] | None):
    drafter, batch = random_drafter(token_ids), random_batch()
    expected, counts = np.zeros((2, UNROLL)), np.zeros(UNROLL)
    for depth, target, student in slow_steps(parameters_of(drafter), batch, token_ids):
        best = student.argmax()
        expected[:, depth - 1] += best == target.argmax(), target[best]
        counts[depth - 1] += 1
    starts = starts_of(view_of(batch))
    found, found_counts = acceptance_by_depth(drafter, starts, head_of(token_ids))
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)
    assert found_counts.tolist() == counts.tolist()
    assert counts[0] > counts[-1] > 0


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("token_ids", [None, TRIMMED])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, token_ids: list[int] | None, rows: int
):
    drafter, starts = random_drafter(token_ids), starts_of(view_of(random_batch()))

    def everything() -> list[np.ndarray]:
        loss_and_grads = nn.value_and_grad(drafter, drafter_loss)
        found, grads = loss_and_grads(drafter, starts, head_of(token_ids), 0.8, "lk")
        return [np.array(x) for x in (*found, *dict(tree_flatten(grads)).values())]

    expected = everything()
    monkeypatch.setattr(module, "rows_at_once", lambda head: rows)
    for found, whole in zip(everything(), expected, strict=True):
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_views_in_parts_are_the_whole():
    view = view_of(random_batch())
    view = dataclasses.replace(view, taps=(view.hidden + 1,))
    cut = 7
    parts = [
        TargetView(
            view.hidden[part],
            view.tokens[part],
            view.ahead[part],
            view.goals[part],
            view.embed,
            (view.taps[0][part],),
        )
        for part in (slice(cut), slice(cut, None))
    ]
    joined = joined_views(parts)
    for name in ("hidden", "tokens", "ahead", "goals"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(view, name))
    np.testing.assert_array_equal(joined.taps[0], view.taps[0])


def test_a_batch_without_answers_of_two_tokens_counts_nothing():
    drafter, batch = random_drafter(), random_batch()
    starts = starts_of(rows_of(batch, np.eye(4, WIDTH)))
    total, count = drafter_loss(drafter, starts, head_of(None))
    assert (total.item(), count.item()) == (0, 0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_learns_the_same(dtype: mx.Dtype):
    """Sums are float32; the rest rounds as its type does."""
    drafter, batch = random_drafter(TRIMMED), random_batch()
    head = head_of(TRIMMED)
    value_and_grad = nn.value_and_grad(drafter, lambda d, s: drafter_loss(d, s, head)[0])
    expected, grads = value_and_grad(drafter, starts_of(view_of(batch)))
    drafter.set_dtype(dtype)
    half = {name: mx.array(array).astype(dtype) for name, array in batch.items()}
    found, half_grads = value_and_grad(drafter, starts_of(view_of(half)))
    assert found.dtype == mx.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    half_flat = dict(tree_flatten(half_grads))
    for name, grad in tree_flatten(grads):
        error = mx.abs(half_flat[name].astype(mx.float32) - grad).max().item()
        assert error < 0.05 * mx.abs(grad).max().item(), name


def test_the_target_gets_no_gradient():
    drafter, batch = random_drafter(), random_batch()

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        starts = starts_of(rows_of(arrays, np.ones((4, WIDTH))))
        return drafter_loss(drafter, starts, head_of(None))[0]

    arrays = {name: mx.array(array) for name, array in batch.items()}
    assert loss(arrays).item() > 0
    for grad in mx.grad(loss)(arrays).values():
        assert mx.abs(grad).max().item() == 0


@pytest.mark.parametrize("shape", [*FORMS[:2], {"token_ids": TRIMMED}], ids=str)
def test_the_drafters_gradient_equals_finite_differences(shape: dict[str, Any]):
    drafter, batch = random_drafter(**shape), random_batch()
    token_ids, starts = shape.get("token_ids"), starts_of(view_of(batch))
    head = head_of(token_ids)
    _, grads = nn.value_and_grad(drafter, lambda d: drafter_loss(d, starts, head)[0])(drafter)
    found = dict(tree_flatten(grads))
    assert found.keys() == dict(tree_flatten(drafter.trainable_parameters())).keys()
    random = np.random.default_rng(3)
    weights = parameters_of(drafter)
    for name, grad in found.items():
        # Along one random direction per parameter.
        step = 1e-5 * random.normal(size=grad.shape)
        up, down = (
            slow_loss({**weights, name: weights[name] + sign * step}, batch, token_ids, 0.8)[0]
            for sign in (1, -1)
        )
        slope = (np.array(grad) * step).sum()
        assert slope == pytest.approx((up - down) / 2, rel=1e-3, abs=1e-9)


def test_a_drafter_overfits_a_task_that_has_one_answer():
    # The target counts up from the first token to the last and starts anew.
    random = np.random.default_rng(4)
    tokens = (np.arange(WIDTH) + np.array([[0], [3], [6], [8]])) % VOCAB_SIZE
    embeddings = random.normal(size=(VOCAB_SIZE, HIDDEN_SIZE)).astype(np.float32)
    batch = {
        "logits": 20 * np.eye(VOCAB_SIZE, dtype=np.float32)[(tokens + 1) % VOCAB_SIZE],
        "hidden": embeddings[tokens],
        "embeddings": embeddings[tokens],
    }
    drafter, starts = random_drafter(), starts_of(view_of(batch))
    arrays = (starts.hidden, starts.embeddings, starts.goals)
    teacher = [np.array(x) for x in arrays]

    def mean_loss(drafter: RecurrentDrafter) -> mx.array:
        total, count = drafter_loss(drafter, starts, head_of(None))
        return total / count

    optimizer = optim.Adam(learning_rate=0.02)
    loss_and_grad = nn.value_and_grad(drafter, mean_loss)
    first = mean_loss(drafter).item()
    for _ in range(150):
        _, grads = loss_and_grad(drafter)
        optimizer.update(drafter, grads)
        mx.eval(drafter.parameters(), optimizer.state)
    assert first > 1
    assert mean_loss(drafter).item() < 0.01
    agreed, counts = acceptance_by_depth(drafter, starts, head_of(None))
    assert agreed[0].tolist() == counts.tolist()
    assert mx.all(agreed[1] > 0.99 * counts).item()
    for before, after in zip(teacher, arrays, strict=True):
        np.testing.assert_array_equal(before, np.array(after))
