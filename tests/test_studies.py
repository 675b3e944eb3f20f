"""What a benchmark measures beside its arms, where some of it cannot be measured."""

from dataclasses import replace
from typing import Any

import pytest
from drafting import with_eos
from tiny_models import tiny_model

import mlx_distill
from mlx_distill import Answer, InputError, benchmark
from mlx_distill.benchmarking import batches as batch_study
from mlx_distill.benchmarking import roofline, studies
from mlx_distill.benchmarking.arms import Bench
from mlx_distill.benchmarking.batches import batches
from mlx_distill.benchmarking.benchmark import Studies, run
from mlx_distill.benchmarking.config import BenchmarkConfig
from mlx_distill.benchmarking.dispatch_study import of_cycle
from mlx_distill.benchmarking.profile import profile, run_profile
from mlx_distill.core.sampling import Sampling
from mlx_distill.data.prompts import Asked
from mlx_distill.drafters.nothing import NoDrafter
from mlx_distill.drafters.protocol import DraftPlan

STARTS = ("Once upon a time", "Ben had a red kite that")
CONFIG = BenchmarkConfig(
    num_prompts=2, max_tokens=6, timed_prompts=1, sweep_widths=(1, 4), sweep_lengths=(1, 4)
)


@pytest.fixture
def bench(bundled_pair: tuple[Any, Any], bundled_drafter: Any) -> Bench:
    return Bench(*bundled_pair, bundled_drafter, None, Sampling(), CONFIG)


@pytest.fixture
def one_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[Bench, list[Asked]]:
    """Return a bench, and prompts of which the first is answered with one token."""
    monkeypatch.setattr(roofline, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(roofline, "LARGEST", 256)
    asked = [Asked(bench.tokenizer.encode(text)) for text in STARTS]
    (first,) = mlx_distill.stream_generate(bench.model, bench.tokenizer, asked[0].ids, max_tokens=1)
    return replace(bench, tokenizer=with_eos(bench.tokenizer, {first.token})), asked


def test_prompts_with_one_token_of_answer_are_not_timed(
    one_ends: tuple[Bench, list[Asked]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured was lost, because the first of them could not be."""
    bench, asked = one_ends
    monkeypatch.setattr(studies, "SHARING_SHAPES", ((2, 3),))
    monkeypatch.setenv("MLX_DISTILL_CALIBRATE", "0")
    bench = replace(bench, config=replace(CONFIG, sweep_prompts=1, sweep_widths=(1,)))
    found = run(bench, asked, DraftPlan(), Studies(sharing=True, page=True))
    assert found["arms"][0]["prompts"] == found["profile"]["prompts"] == 1
    assert found["overhead"]["cycle_ms"] > 0
    assert found["sharing"][0]["saved_share"] < 1
    assert len(found["sweep"]) == 2


def test_a_profile_leaves_them_out(one_ends: tuple[Bench, list[Asked]]) -> None:
    bench, asked = one_ends
    prompts = [one.ids for one in asked]
    found = profile(bench, prompts, DraftPlan(), run_profile(bench, prompts, DraftPlan()))
    assert found["prompts"] == 1
    sent = {row["part"]: row["dispatches"] for row in found["parts"]}
    assert min(sent["draft"], sent["walk"]) > 0
    cycle = of_cycle(bench.model, bench.tokenizer, bench.drafter, prompts[0], DraftPlan(), 0.0)
    assert min(cycle["draft"], cycle["rest"]) > 0


def test_batches_of_nothing(one_ends: tuple[Bench, list[Asked]]) -> None:
    bench, asked = one_ends
    with pytest.raises(InputError, match="every answer ended with its first token"):
        batches(bench, [asked[0].ids], [2], 1)


@pytest.mark.parametrize("name", ["gemma2", "mamba"])
def test_mlx_lms_batches_that_are_none(bench: Bench, name: str) -> None:
    """The first ended in a traceback of mlx-lm's, the second was compared with other texts."""
    bench = replace(bench, model=tiny_model(name, vocab_size=4096), drafter=NoDrafter())
    with pytest.raises(InputError, match="leave out --batch"):
        batches(bench, [[1, 5, 6], [1, 7]], [2], 1)


def test_an_answer_that_fails_is_no_fast_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Answer(0).fail(InputError("its logits are no numbers"))
    monkeypatch.setattr(batch_study, "answer_steps", lambda *args, **options: iter([[failed]]))
    with pytest.raises(InputError, match="no numbers"):
        batches(bench, [[1, 5, 6]], [1], 1)


def test_prefixes_of_nothing(one_ends: tuple[Bench, list[Asked]]) -> None:
    bench, asked = one_ends
    assert studies.sharing(bench, [asked[0].ids]) == []


def test_a_sweep_of_nothing(one_ends: tuple[Bench, list[Asked]]) -> None:
    bench, asked = one_ends
    assert studies.sweep(bench, [asked[0].ids], DraftPlan()) == []


def test_a_sweep_is_the_drafters(bench: Bench) -> None:
    """It was that of the draft model, which has no beams, where there was one."""
    both = replace(bench, draft_model=bench.model)
    prompts = [bench.tokenizer.encode(STARTS[0])]
    found, alone = (studies.sweep(one, prompts, DraftPlan()) for one in (both, bench))
    tokens = [[row["tokens_per_call"] for row in rows] for rows in (found, alone)]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1


@pytest.mark.parametrize("limit", [8, 64])
def test_no_context_that_could_grow(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    monkeypatch.setattr(studies, "text_limit", lambda model: limit)
    assert studies.growth(bench, [[1, 5, 6]], DraftPlan(), 256) == []
    assert f"no growing context: the model reads {limit} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dispatches", "--sweep-prompts", "1", "--plot", "p.png"], "leave --sweep-prompts out"),
        (["--profile", "--growth", "128"], "--profile goes alone; leave --growth out"),
        (["--batch", "2", "--sharing"], "--batch goes alone; leave --sharing out"),
        (["--loss-memory", "8", "8", "--long-run", "9"], "leave --long-run out"),
        (["--output", "a", "--report", "./a"], "--output and --report name the same file"),
        (["--batch", "2", "--profile"], "--batch and --profile go alone"),
        (["--results", "a.json", "--report", "p.html", "--output", "o.json"], "leave --output out"),
    ],
)
def test_what_goes_alone(
    flags: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing that was asked for is passed over, or found to be missing in the end."""
    monkeypatch.setattr(benchmark.cli, "load_model", None)
    assert benchmark.main(flags) == 2
    assert sentence in capsys.readouterr().err
