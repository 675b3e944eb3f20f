"""What a drafter is worth by known answers: the same as when they are generated."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from half_models import REFERENCE
from test_context_blocks import with_blocks

import mlx_distill
from mlx_distill import evaluate
from mlx_distill.core.draft import Draft
from mlx_distill.core.posterior_noise import noise_behind
from mlx_distill.core.sampling import TextNoise
from mlx_distill.distillation.responses import Response
from mlx_distill.drafters.medusa import MedusaConfig, MedusaHeads
from mlx_distill.drafters.medusa_drafter import MedusaDrafter
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.evaluation.drafts import class_name, judge_drafts
from mlx_distill.evaluation.known_texts import posterior_noise
from mlx_distill.evaluation.met import Met
from mlx_distill.target.target import Target

PLANS = {
    "chain": DraftPlan(1, 3, 4),
    "tree": DraftPlan(4, 4, 8),
    "beams": DraftPlan(3, 3, tree="beam"),
}


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any], bundled_drafter: Drafter) -> tuple[Any, Any, Drafter]:
    return *bundled_pair, bundled_drafter


def one_draft(tokens: list[int], parents: list[int], scores: list[float]) -> Draft:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    fields = (mx.array(x)[None] for x in (tokens, parents, depths, scores))
    return Draft(*fields, max(depths))


@pytest.mark.parametrize(
    ("follows", "nodes", "accepted"),
    [
        ([1, 2], 8, 2),
        ([1, 2], 3, 1),
        ([1, 2], 4, 2),
        ([3, 9], 8, 1),
        ([3, 9], 2, 0),
        ([2, 1], 8, 0),
    ],
)
def test_a_tree_has_the_tokens_that_its_likeliest_nodes_have(
    follows: list[int], nodes: int, accepted: int
):
    draft = one_draft([7, 1, 3, 2], [0, 0, 0, 1], [0.0, -0.1, -0.2, -0.3])
    met = Met.of(draft, np.array([follows]))
    assert met.accepted(DraftPlan(2, 2, nodes)).tolist() == [accepted]
    assert met.num_nodes(DraftPlan(2, 2, nodes)).tolist() == [min(nodes, 4)]


def test_beams_leave_out_what_ends_early():
    draft = one_draft([7, 1, 3, 2, 4], [0, 0, 0, 1, 1], [0.0, -0.1, -0.2, -0.3, -0.4])
    for follows, accepted in ([3, 9], 0), ([1, 4], 2), ([1, 9], 1):
        met = Met.of(draft, np.array([follows]))
        assert met.accepted(DraftPlan(2, 2, tree="beam")).tolist() == [accepted]
        assert met.num_nodes(DraftPlan(2, 2, tree="beam")).tolist() == [4]


def repeating_heads(model: Any) -> MedusaDrafter:
    """Return heads that take the text to go on with what is likely to stand there already."""
    rates = ((0.5, 0.3), (0.4, 0.2), (0.3, 0.1), (0.2, 0.1))
    network = MedusaHeads(MedusaConfig(384, 4096, num_heads=4, hit_rates=rates))
    embed = Target.of(model).embed
    assert embed is not None
    network.head.weight = embed.weight
    for number, (block,) in enumerate(network.blocks):  # else a b and b a are as likely
        block.linear.bias = 0.1 * mx.random.normal((384,), key=mx.random.key(number))
    return MedusaDrafter(network, {})


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        *(("recurrent", 0.0), ("recurrent", 0.7), ("ngram", 0.0), ("blocks", 0.0)),
        *(("blocks", 0.7), ("medusa", 0.7)),
    ],
)
def test_known_answers_take_as_many_calls_as_generated_ones(
    pair: tuple[Any, Any, Drafter], kind: str, temperature: float
):
    model, tokenizer, drafter = pair
    if kind == "ngram":
        drafter = NGramDrafter(store_tokens=0)
    if kind == "blocks":
        drafter = with_blocks(drafter, 1, 8)
    names = {"ngram": ["chain"], "blocks": ["tree"]}.get(kind, PLANS)
    plans = {name: PLANS[name] for name in names}
    if kind == "medusa":
        drafter = repeating_heads(model)
        plans = {"tree": PLANS["tree"], "static": DraftPlan(2, 3, 6, "static")}
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "Tom and Lily")]
    calls, nodes = dict.fromkeys(plans, 0), dict.fromkeys(plans, 0)
    answers = []
    for prompt in prompts:
        found = []
        for name, plan in plans.items():
            options = {"plan": plan, "temperature": temperature, "seed": 5, "max_tokens": 31}
            found = list(
                mlx_distill.stream_generate(model, tokenizer, prompt, drafter=drafter, **options)
            )
            calls[name] += found[-1].target_calls
            nodes[name] += found[-1].verified_tokens
        answers.append(Response(prompt, [one.token for one in found]))

    def noise(row: int, tokens: mx.array, logits: mx.array) -> mx.array:
        rows = TextNoise(mx.random.key(5), logits.shape[-1])
        return temperature * rows.rows(0, tokens.size)

    drawn = noise if temperature else None
    judged = judge_drafts(drafter, Target.of(model), answers, plans, ["x", "y"], drawn)
    for name, worth in judged.worth.items():
        assert worth[""].tokens == sum(len(one.response) - 1 for one in answers)
        assert worth[""].calls == calls[name]
        # Of the noise behind a text that was cut nothing is known, and beams that it would have
        # chosen share other prefixes there: each text's last tree may be of another size.
        most = 9 * len(answers) if temperature and plans[name].tree == "beam" else 0
        assert abs(worth[""].nodes - nodes[name]) <= most
        assert worth[""].calls == worth["x"].calls + worth["y"].calls
    mx.clear_cache()


def test_noise_behind_a_text_is_as_if_it_had_drawn_it():
    """Every value is Gumbel noise, two of a row are independent, and it draws the text."""
    count = 40_000
    law = mx.log(mx.array([0.6, 0.25, 0.1, 0.05]))
    tokens = mx.random.categorical(law, shape=(count,), key=mx.random.key(1))
    rows = mx.broadcast_to(law, (count, 4))
    noise = noise_behind(rows, tokens, mx.random.key(2))
    assert mx.array_equal(mx.argmax(rows + noise, axis=1), tokens)
    uniform = np.exp(-np.exp(-np.array(noise, np.float64)))
    for column in uniform.T:
        found = np.histogram(column, bins=20, range=(0, 1))[0]
        assert ((found - count / 20) ** 2 / (count / 20)).sum() < 45  # of chi2(19): 0.0007
    assert np.abs(np.corrcoef(uniform.T) - np.eye(4)).max() < 0.02


def test_unknown_noise_is_as_good_as_the_noise_that_drew_the_text(
    pair: tuple[Any, Any, Drafter],
):
    """The same texts: calls with the noise that drew them, and with noise from its law."""
    model, tokenizer, drafter = pair
    prompt = tokenizer.encode("Once upon a time")
    options: dict[str, Any] = {"plan": PLANS["tree"], "temperature": 1.0, "max_tokens": 48}
    options |= {"drafter": drafter, "batch": 8}  # which take the calls that each takes alone
    each = [{"seed": seed} for seed in range(8)]
    written = mlx_distill.batch_generate(model, tokenizer, [prompt] * 8, each=each, **options)
    answers = [Response(prompt, one.tokens) for one in written]
    calls = sum(one.last.target_calls for one in written if one.last)
    plans = {"tree": PLANS["tree"]}
    estimates = [
        judge_drafts(drafter, Target.of(model), answers, plans, noise=noise).worth["tree"][""].calls
        for noise in (posterior_noise(1.0), None)
    ]
    assert abs(estimates[0] - calls) < 0.1 * calls
    assert estimates[1] > 1.1 * calls  # blind to the noise, drafts are worse
    mx.clear_cache()


def test_the_command_judges_every_shape_at_every_temperature(
    bundled_once: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    data = tmp_path / "prompts.jsonl"
    rows = [("a", "Once upon a time"), ("a", "One day"), ("b", "Tom and Lily")]
    data.write_text("".join(f'{{"category": "{k}", "prompt": "{p}"}}\n' for k, p in rows))
    flags = f"--data {data} --answer-tokens 24 --nodes 4 8 --rounds 3 --max-texts 2 --json"
    drafter = str(REFERENCE)
    assert evaluate.main(["--drafter", drafter, *flags.split()]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["temperatures"].keys() == {"0", "1"}
    for figures in found["temperatures"].values():
        shapes = figures["shapes"]
        assert list(shapes)[:6] == [f"chain of {n}" for n in range(1, 7)]
        assert shapes["8 nodes"].keys() == {"all", "a", "b"}  # classes take turns
        worth = [shapes[name]["all"]["tokens_per_call"] for name in ("4 nodes", "8 nodes")]
        assert 1 < worth[0] <= worth[1] <= 7
        assert figures["hits"] == sorted(figures["hits"])

    costs = found["costs"]
    assert costs["dispatches"]["draft"] < costs["dispatches"]["plain_step"]
    assert costs["step_dispatch_share"] < 0.2
    assert found["size"]["parameters"] == 952_704


def test_a_class_that_is_called_all_is_told_from_all(pair: tuple[Any, Any, Drafter]):
    prompt = pair[1].encode("Once upon a time")
    answers = [Response(prompt, list(range(5, 5 + length))) for length in (4, 7)]
    drafter, target = NGramDrafter(), Target.of(pair[0])
    plans = {"tree": DraftPlan(1, 2, 3)}
    found = judge_drafts(drafter, target, answers, plans, ["all", "b"]).to_dict()["shapes"]
    tokens = {kind: worth["tokens"] for kind, worth in found["tree"].items()}  # pyright: ignore
    assert tokens["all"] == tokens["all (class)"] + tokens["b"]
    names = ["", "all", "all (class)", "all (class) (class)", "b"]
    assert len(set(map(class_name, names))) == len(names)


def test_answers_that_are_there_are_judged_as_they_are(
    bundled_once: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: tuple[Any, Any, Drafter],
):
    """Of a file with others, the greedy ones."""
    prompt = pair[1].encode("Once upon a time")
    arrays = {"prompt": prompt * 2, "prompt_len": [len(prompt)] * 2, "answer": [*range(5, 12)]}
    np.savez(tmp_path / "a.npz", **arrays, answer_len=[4, 3], greedy=[False, True])
    flags = ["--temperatures", "0", "--chains", "1", "--nodes", "3", "--rounds", "0", "--json"]
    drafter = str(REFERENCE)
    config = ["--chat-template-config", '{"a": 1}']
    named = ["--drafter", drafter, "--data", str(tmp_path / "a.npz")]
    assert evaluate.main([*named, *config]) == 2
    assert "answers are token ids already" in capsys.readouterr().err
    assert evaluate.main([*named, *flags]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["temperatures"]["0"]["tokens"] == 3
    assert found["costs"] is None
    assert "another model" in out  # nobody would write that


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--nodes 0", "nodes must be .*, got 0"),
        ("--beams 4", "beams are a width and a length, got 1"),
        ("--beams 4 65", "draft_length must be .*, got 65"),
        ("--temperatures -1", "temperatures must be .*, got -1"),
        ("--student a=b", "judged with its target, --teacher, and nothing else"),
        ("--data nowhere.npz", "there is no such file"),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str, sentence: str
):
    (tmp_path / "data.jsonl").write_text('{"prompt": "Once"}\n')
    data = ["--data", str(tmp_path / "data.jsonl")]
    assert evaluate.main(["--drafter", "no/such/folder", *data, *flags.split()]) == 2
    assert re.search(sentence, capsys.readouterr().err)
