"""Answers written in one batch: each is what the model would have written alone."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_distill.distillation.answer_batch import Wanted, written
from mlx_distill.target.batch.merged import takes_merged

ENDS = {3, 4, 5, 6, 7}


def asked(count: int, temperature: float = 0.0) -> list[Wanted]:
    """Return wanted answers to prompts of 1 to 12 tokens, between 1 and 16 tokens long."""
    random = np.random.default_rng(5)
    prompts = [random.integers(8, 97, 1 + 5 * row % 12).tolist() for row in range(count)]
    return [
        Wanted(prompt, 1 + 7 * row % 16, temperature, row) for row, prompt in enumerate(prompts)
    ]


def alone(model: nn.Module, wanted: Wanted) -> list[int]:
    """Return a greedy answer, every token of it from the whole text before it."""
    text = list(wanted.prompt)
    while len(text) < len(wanted.prompt) + wanted.most:
        text.append(int(mx.argmax(model(mx.array([text]))[0, -1]).item()))
        if text[-1] in ENDS:
            break
    return text[len(wanted.prompt) :]


# Caches that grow, that rotate, that hold a recurrent state, and a table of positions.
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2", "gpt2"])
def test_every_answer_is_the_one_that_is_written_alone(name: str) -> None:
    model = tiny_model(name)
    wanted = asked(11)
    answers = dict(written(model, wanted, ENDS, 4))
    assert answers == {place: alone(model, one) for place, one in enumerate(wanted)}
    ended = [answer[-1] in ENDS for answer in answers.values()]
    assert any(ended)
    assert not all(ended)


# mlx-lm takes padding for text, has masks without an axis for the texts, takes positions for one
# number, counts slots, or has caches that cannot be merged.
@pytest.mark.parametrize(
    "name", ["mamba", "bailing_moe_linear", "gemma2", "gpt_bigcode", "afm7", "llama4"]
)
def test_a_model_that_takes_no_batches_of_mlx_lm_writes_one_by_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(name)
    wanted = asked(7)
    answers = dict(written(model, wanted, ENDS, 4))
    for place, one in enumerate(wanted):
        caches, text, answer = make_prompt_cache(model), one.prompt, answers[place]
        for token in answer:
            logits = model(mx.array([text]), cache=caches)[0, -1]
            assert token == mx.argmax(logits).item()
            text = [token]
        assert answer[-1] in ENDS or len(answer) == one.most
    list(written(model, wanted[:3], ENDS, 4))
    assert capsys.readouterr().err.count("answers are written one by one") == 1


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2", "gpt2", "qwen3_next"])
def test_models_that_take_batches_of_mlx_lm_write_so(name: str) -> None:
    assert takes_merged(tiny_model(name))


def test_what_is_drawn_does_not_depend_on_the_rows_beside_it() -> None:
    model = tiny_model("llama")
    wanted = [one for pair in zip(asked(8), asked(8, 0.8), strict=True) for one in pair]
    few, many = dict(written(model, wanted, ENDS, 2)), dict(written(model, wanted, ENDS, 16))
    assert few == many
    assert all(many[place] == alone(model, wanted[place]) for place in range(0, 16, 2))
    assert any(many[place] != many[place + 1] for place in range(0, 16, 2))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_answers_are_drawn_from_the_models_distribution(temperature: float) -> None:
    """Of 4,000 draws of two tokens; their total variation is about 0.06 if the law is right."""
    model = tiny_model("llama")
    wanted = [Wanted([9, 30], 2, temperature, seed) for seed in range(4000)]
    found = np.array([answer for _, answer in written(model, wanted, set(), 4000)])
    first = np.array(mx.softmax(model(mx.array([[9, 30]]))[0, -1] / temperature))
    texts = mx.array([[9, 30, token] for token in range(97)])
    second = first @ np.array(mx.softmax(model(texts)[:, -1] / temperature, axis=-1))
    for place, law in enumerate((first, second)):
        share = np.bincount(found[:, place], minlength=97) / len(found)
        assert np.abs(share - law).sum() / 2 < 0.09
    assert len({tuple(row) for row in found.tolist()}) > 97  # the second is another draw


class Watched(nn.Module):
    """A model that notes the longest text it is given."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.layers = model.layers
        self.longest = 0

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        length = int(mx.array(cache[0].offset).max().item()) + inputs.shape[1]
        self.longest = max(self.longest, length)
        return self.model(inputs, cache=cache)


def test_the_model_is_never_given_more_than_it_reads() -> None:
    """A row that has ended waits for others, but not where there are no positions left."""
    model = Watched(tiny_model("gpt2"))
    wanted = [Wanted([9] * 20, 12, 0.0, 0), *(Wanted([row], 30, 0.0, 0) for row in range(40, 47))]
    answers = dict(written(model, wanted, set(), 8, limit=32))
    assert [len(answers[place]) for place in range(8)] == [12, *[30] * 7]
    assert model.longest <= 32


def test_rows_begin_before_all_have_ended() -> None:
    """One long answer and many short ones take hardly more steps than the long one."""
    model = tiny_model("llama")
    lengths = [60, *[6] * 24]
    wanted = [Wanted([20 + row], most, 0.0, 0) for row, most in enumerate(lengths)]
    order = [place for place, _ in written(model, wanted, set(), 4)]
    assert sorted(order) == list(range(25))
    assert order.index(0) >= 20
