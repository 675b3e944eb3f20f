"""What a drafter is worth by known answers: the same as when they are generated."""

import mlx.core as mx
import pytest

import mlx_distill
from mlx_distill.checkpoint import bundled
from mlx_distill.distillation.responses import Response
from mlx_distill.drafters.protocol import DraftPlan
from mlx_distill.evaluation.drafts import accepted_tokens, judge_drafts
from mlx_distill.target.target import Target


def test_accepted_tokens_follow_the_tree():
    tokens, parents = [7, 1, 2, 3, 1], [0, 0, 1, 0, 3]
    assert accepted_tokens(tokens, parents, [1, 2, 9]) == 2
    assert accepted_tokens(tokens, parents, [3, 1]) == 2
    assert accepted_tokens(tokens, parents, [2, 1]) == 0
    assert accepted_tokens(tokens, parents, []) == 0


@pytest.mark.parametrize("plan", [DraftPlan(4, 4, 8), DraftPlan(1, 3, 4)])
def test_known_answers_take_as_many_calls_as_generated_ones(plan: DraftPlan):
    model, tokenizer = mlx_distill.load(bundled("stories-14m"))
    drafter = mlx_distill.load_drafter(bundled("stories-14m-redrafter"), model, tokenizer)
    answers, calls = [], 0
    for text in ("Once upon a time", "Tom and Lily"):
        prompt = tokenizer.encode(text)
        found = list(
            mlx_distill.stream_generate(
                model, tokenizer, prompt, drafter=drafter, plan=plan, max_tokens=40
            )
        )
        answers.append(Response(prompt, [one.token for one in found][:40]))
        calls += found[-1].target_calls
    worth = judge_drafts(drafter, Target.of(model), answers, plan, ["x", "y"])
    assert worth.keys() == {"", "x", "y"}
    assert worth[""].tokens == sum(len(one.response) - 1 for one in answers)
    assert worth[""].calls == worth["x"].calls + worth["y"].calls
    assert abs(worth[""].calls - calls) <= len(answers)  # the last call may bring nothing more
    assert worth[""].reached[0] > worth[""].reached[-1] > 0
    mx.clear_cache()
