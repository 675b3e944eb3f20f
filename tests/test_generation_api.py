"""The public interface: names, responses, counters, kinds of prompts, stop texts, refusals."""

import dataclasses
import inspect
import itertools
import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from half_models import REFERENCE
from mlx_lm.generate import GenerationResponse as MlxLmResponse
from mlx_lm.models.cache import make_prompt_cache
from transformers import AutoTokenizer

import mlx_distill
from mlx_distill import CacheConfig, DraftPlan, GenerationResponse, InputError
from mlx_distill.checkpoint import bundled
from mlx_distill.speculation.statistics import DraftCounters
from mlx_distill.speculation.stop_texts import StopCutter

PROMPT = "Once upon a time"
PLANS = (
    DraftPlan(),
    DraftPlan(1, 3, 4),
    DraftPlan(3, 2, 7),
    DraftPlan(nodes=1),
    DraftPlan(4, 5, tree="beam"),
)


@pytest.fixture(scope="module")
def pair(bundled_pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return bundled_pair


@pytest.fixture(scope="module")
def drafter(bundled_drafter: Any) -> Any:
    return bundled_drafter


# --------------------------------------------------------------------------------- public names


def test_public_names() -> None:
    names = ("load", "load_drafter", "generate", "stream_generate", "GenerationResponse")
    assert set(names) <= set(mlx_distill.__all__)
    assert all(hasattr(mlx_distill, name) for name in mlx_distill.__all__)
    assert set(names) <= set(dir(mlx_distill))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlx_distill.nothing  # noqa: B018  # pyright: ignore


def test_a_command_imports_no_more_than_it_needs() -> None:
    code = """
import sys
import mlx_distill
print(*sorted({"mlx", "mlx_lm", "transformers"} & set(sys.modules)))
import mlx_distill.generate
unneeded = ("mlx_distill.distillation", "mlx_distill.training", "matplotlib")
print(*(name for name in sys.modules if name.startswith(unneeded)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "\n\n"


def test_arguments_of_the_contract() -> None:
    parameters = inspect.signature(mlx_distill.stream_generate).parameters
    defaults = {
        "drafter": None,
        "max_tokens": 256,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "logits_processors": None,
        "prompt_cache": None,
    }
    assert list(parameters)[:3] == ["model", "tokenizer", "prompt"]
    assert {name: parameters[name].default for name in defaults} == defaults
    assert list(inspect.signature(mlx_distill.load_drafter).parameters)[1] == "model"


def test_load_returns_what_mlx_lm_returns(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    other_model, other_tokenizer = mlx_lm.load(str(bundled("stories-14m")))
    assert type(model) is type(other_model)
    assert type(tokenizer) is type(other_tokenizer)
    if mx.default_device() == mx.Device(mx.cpu):
        assert model.model.embed_tokens.weight.dtype == mx.float32


def test_package_is_callable_after_the_command_was_imported(pair: tuple[Any, Any]) -> None:
    """The module and the function have the same name; importing one must not hide the other."""
    import mlx_distill.generate as command

    assert callable(command.main)
    assert mlx_distill.generate(*pair, PROMPT, max_tokens=3)


# ------------------------------------------------------------------------------------- responses


def test_response_has_every_field_of_mlx_lm(pair: tuple[Any, Any], drafter: Any) -> None:
    theirs = [field.name for field in dataclasses.fields(MlxLmResponse)]
    mine = [field.name for field in dataclasses.fields(GenerationResponse)]
    assert mine[: len(theirs)] == theirs
    counters = {
        "target_calls",
        "tokens_per_call",
        "drafted_tokens",
        "accepted_tokens",
        "verified_tokens",
        "beam_tokens",
    }
    assert counters <= set(mine) - set(theirs)
    expected = list(mlx_lm.stream_generate(*pair, PROMPT, max_tokens=8))
    for one in (drafter, None):
        responses = list(mlx_distill.stream_generate(*pair, PROMPT, drafter=one, max_tokens=8))
        for count, (response, other) in enumerate(zip(responses, expected, strict=True), start=1):
            for name in theirs:
                assert type(getattr(response, name)) is type(getattr(other, name)), name
            assert response.generation_tokens == other.generation_tokens == count
            assert response.prompt_tokens == other.prompt_tokens == 5
            assert response.prompt_tps == responses[0].prompt_tps > 0
            assert response.generation_tps > 0
            assert response.peak_memory > 0
            assert abs(mx.exp(response.logprobs).sum().item() - 1) < 1e-3
            assert mx.argmax(response.logprobs).item() == response.token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", PLANS)
def test_counters_are_consistent(
    pair: tuple[Any, Any], drafter: Any, plan: DraftPlan, temperature: float
) -> None:
    options = {"drafter": drafter, "plan": plan, "temperature": temperature, "seed": 7}
    from_draft, calls = 0, 0
    last = None
    for last in mlx_distill.stream_generate(*pair, PROMPT, max_tokens=16, **options):
        from_draft += last.from_draft
        assert last.target_calls >= calls  # they never go back
        calls = last.target_calls
        assert last.tokens_per_call == last.generation_tokens / max(calls, 1)
        assert last.verified_tokens == last.drafted_tokens + calls
        assert calls <= last.verified_tokens <= max(last.beam_tokens, calls)
        assert last.accepted_tokens <= last.drafted_tokens
        if plan.tree == "best-first":
            assert last.verified_tokens <= plan.nodes * calls
        else:
            assert last.beam_tokens == plan.beam_width * (plan.draft_length + 1) * calls
        if not last.from_draft:  # the end of a cycle: everything accepted has been handed out
            assert last.accepted_tokens == from_draft
            assert last.generation_tokens == 1 + calls + from_draft
        shares = last.acceptance_by_depth
        assert all(1 >= a >= b >= 0 for a, b in itertools.pairwise((1.0, *shares)))
        assert sum(shares) * calls >= last.accepted_tokens - 1e-6  # some are still to come
    assert last is not None
    assert last.finish_reason == "length"


def test_accepted_tokens_are_those_of_the_text(pair: tuple[Any, Any], drafter: Any) -> None:
    """Also where the text ends in the middle of a draft: what was accepted past it is no text."""
    for max_tokens in range(1, 12):
        options = {"drafter": drafter, "max_tokens": max_tokens}
        responses = list(mlx_distill.stream_generate(*pair, PROMPT, **options))
        assert responses[-1].accepted_tokens == sum(r.from_draft for r in responses), max_tokens


def test_counters_without_drafter(pair: tuple[Any, Any]) -> None:
    *_, last = mlx_distill.stream_generate(*pair, PROMPT, max_tokens=10)
    assert (last.target_calls, last.verified_tokens, last.drafted_tokens) == (9, 9, 0)
    assert last.tokens_per_call == 10 / 9


def test_drafter_saves_calls(whole_pair: tuple[Any, Any]) -> None:
    """On the whole model that it was trained for."""
    drafter = mlx_distill.load_drafter(REFERENCE, *whole_pair)
    *_, last = mlx_distill.stream_generate(*whole_pair, PROMPT, drafter=drafter, max_tokens=40)
    assert last.tokens_per_call > 2
    options = {"drafter": drafter, "plan": DraftPlan(4, 5, tree="beam")}
    *_, last = mlx_distill.stream_generate(*whole_pair, PROMPT, max_tokens=20, **options)
    assert last.verified_tokens < 0.9 * last.beam_tokens  # beams share prefixes


def test_counters_of_a_known_tree() -> None:
    counters = DraftCounters()
    # Beams 91-92-93-95, 91-92-94-96 and 91-92-93-97 as a tree of seven nodes.
    counters.add([0, 0, 1, 2, 1, 4, 2], 2)
    assert counters.beam_tokens == 12
    assert (counters.target_calls, counters.verified_tokens) == (1, 7)
    assert counters.drafted_tokens == 6
    counters.add([0], 0)
    assert counters.beam_tokens == 13
    assert counters.acceptance_by_depth == [0.5, 0.5, 0.0]


# --------------------------------------------------------------------------------------- prompts


def test_kinds_of_prompts(pair: tuple[Any, Any], drafter: Any) -> None:
    ids = pair[1].encode(PROMPT)
    prompts = [
        PROMPT,
        ids,
        tuple(ids),
        mx.array(ids),
        mx.array(ids, dtype=mx.uint32),
        mx.array(ids, dtype=mx.int64),
    ]
    for one in (drafter, None):
        texts = [
            mlx_distill.generate(*pair, prompt, drafter=one, max_tokens=7) for prompt in prompts
        ]
        assert texts == [texts[0]] * len(prompts)
        assert texts[0] == mlx_lm.generate(*pair, PROMPT, max_tokens=7)


def test_bos_is_not_doubled(pair: tuple[Any, Any]) -> None:
    first = next(mlx_distill.stream_generate(*pair, "<s>" + PROMPT, max_tokens=2))
    other = next(mlx_lm.stream_generate(*pair, "<s>" + PROMPT, max_tokens=2))
    assert first.prompt_tokens == other.prompt_tokens
    assert first.token == other.token


def test_prompt_of_one_token(pair: tuple[Any, Any], drafter: Any) -> None:
    expected = mlx_lm.generate(*pair, [1], max_tokens=12)
    assert mlx_distill.generate(*pair, [1], drafter=drafter, max_tokens=12) == expected


def test_generate_is_the_joined_stream(pair: tuple[Any, Any], drafter: Any) -> None:
    options: dict[str, Any] = {"drafter": drafter, "max_tokens": 30, "stop": ["little"]}
    responses = mlx_distill.stream_generate(*pair, PROMPT, **options)
    text = mlx_distill.generate(*pair, PROMPT, **options)
    assert text == "".join(response.text for response in responses)
    assert "little" not in text


def test_stop_text_alone_is_not_taken_for_its_letters(pair: tuple[Any, Any]) -> None:
    expected = mlx_distill.generate(*pair, PROMPT, max_tokens=12, stop=["there"])
    try:
        text = mlx_distill.generate(*pair, PROMPT, max_tokens=12, stop="there")
    except InputError as refusal:
        assert "stop" in str(refusal)  # noqa: PT017
    else:
        assert text == expected


def test_raw_tokenizer_is_wrapped(pair: tuple[Any, Any], drafter: Any) -> None:
    model, tokenizer = pair
    expected = mlx_distill.generate(model, tokenizer, PROMPT, max_tokens=8)
    raw = AutoTokenizer.from_pretrained(bundled("stories-14m"))
    for one in (drafter, None):
        text = mlx_distill.generate(model, raw, PROMPT, drafter=one, max_tokens=8)
        assert text.strip() == expected.strip()


@pytest.mark.parametrize("prompt", ["", [], mx.array([], dtype=mx.int32)])
def test_empty_prompt_is_refused(pair: tuple[Any, Any], prompt: Any) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        mlx_distill.stream_generate(*pair, prompt)


@pytest.mark.parametrize(
    "prompt",
    [[2**31], [2**70], mx.zeros((3,)), mx.array([[1, 2]]), mx.array([2**32], dtype=mx.int64)],
    ids=str,
)
def test_what_is_no_prompt_is_refused(pair: tuple[Any, Any], prompt: Any) -> None:
    with pytest.raises(InputError, match="a prompt is a text or token ids, got"):
        mlx_distill.generate(*pair, prompt)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("temperature", ["0.7", None, [0.7]]),
        ("stop", [5, True, [None], {"end": 1}]),
        ("logits_processors", [5, "x", [None], lambda tokens, logits: logits]),
        ("prompt_cache", [3, True, ["x"], {}]),
        ("draft_model", ["x", 3, True, []]),
        ("cache", ["x", 3, [1]]),
        ("max_tokens", ["4", None, 4.0]),
    ],
)
def test_wrong_kinds_of_values_are_named(
    pair: tuple[Any, Any], unchecked_types: None, option: str, values: list[Any]
) -> None:
    """By each way that writes texts."""
    for value in values:
        with pytest.raises(InputError, match=option):
            mlx_distill.generate(*pair, PROMPT, **{"max_tokens": 2, option: value})
        if option not in ("temperature", "max_tokens"):
            continue
        (answer,) = mlx_distill.batch_generate(*pair, [PROMPT], **{"max_tokens": 2, option: value})
        assert answer.finish_reason == "error"
        assert option in str(answer.error)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("Once upon", {}, "prompts must be a list"),
        (None, {}, "prompts must be"),
        ({"a": "b"}, {}, "prompts must be"),
        (["a", "b"], {"batch": "8"}, "batch must be"),
        (["a", "b"], {"batch": 2.0}, "batch must be"),
        (["a", "b"], {"each": [None, None]}, "each must be a list of options"),
        (["a", "b"], {"each": [{}]}, "an entry per prompt: 2, got 1"),
        (["a", "b"], {"each": [{}, {"foo": 1}]}, "the option foo"),
        (["a", "b"], {"cache": "x"}, "cache must be"),
    ],
)
def test_wrong_batches_are_refused(
    pair: tuple[Any, Any], unchecked_types: None, prompts: Any, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        mlx_distill.batch_generate(*pair, prompts, max_tokens=2, **options)


def test_prompts_may_come_from_anywhere(pair: tuple[Any, Any], unchecked_types: None) -> None:
    texts = [PROMPT, "The cat"]
    answers = mlx_distill.batch_generate(*pair, (text for text in texts), max_tokens=3)
    expected = mlx_distill.batch_generate(*pair, texts, max_tokens=3)
    assert [one.text for one in answers] == [one.text for one in expected]
    wrong = [{"stop": 5}, {}]
    failed, fine = mlx_distill.batch_generate(*pair, texts, max_tokens=3, each=wrong)
    assert "stop must be texts" in str(failed.error)
    assert fine.text == expected[1].text


@pytest.mark.parametrize("name", [5, None, 2.5])
def test_what_is_no_path_is_refused(
    pair: tuple[Any, Any], unchecked_types: None, name: Any
) -> None:
    with pytest.raises(InputError, match="must be a path"):
        mlx_distill.load(name)
    with pytest.raises(InputError, match="must be a path"):
        mlx_distill.load_drafter(name, *pair)
    with pytest.raises(InputError, match="got"):
        mlx_distill.MixedDrafter(name)


@pytest.mark.parametrize("drafted", [True, False])
@pytest.mark.parametrize("value", [-mx.inf, mx.nan, mx.inf])
@pytest.mark.parametrize("after", [0, 2])
def test_processors_that_leave_no_token_are_refused(
    pair: tuple[Any, Any], drafter: Any, drafted: bool, value: float, after: int
) -> None:
    ids = pair[1].encode(PROMPT)

    def spoil(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size < len(ids) + after:
            return logits
        spoiled = mx.arange(logits.shape[-1]) >= (0 if value == -mx.inf else 4000)
        return mx.where(spoiled, value, logits)

    options: dict[str, Any] = {"drafter": drafter if drafted else None, "plan": DraftPlan()}
    stream = mlx_distill.stream_generate(*pair, ids, logits_processors=[spoil], **options)
    found = [next(stream).token for _ in range(after)]
    with pytest.raises(InputError, match=f"drawn after {after} tokens of the answer: the logits p"):
        next(stream)
    theirs = mlx_lm.stream_generate(*pair, ids, max_tokens=2)
    assert found == [response.token for response in theirs][:after]


def test_prompt_beyond_the_context_is_refused(pair: tuple[Any, Any], drafter: Any) -> None:
    with pytest.raises(InputError, match=r"513 tokens, the model's context is 512"):
        mlx_distill.stream_generate(*pair, [5] * 513, drafter=drafter)
    cache = make_prompt_cache(pair[0])
    list(mlx_distill.stream_generate(*pair, [5] * 10, prompt_cache=cache, max_tokens=1))
    with pytest.raises(InputError, match=r"502 tokens after 11 cached ones, .* is 512"):
        mlx_distill.stream_generate(*pair, [5] * 502, prompt_cache=cache)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be .*, got 0"),
        ({"max_tokens": -1}, "max_tokens must be .*, got -1"),
        ({"temperature": -0.5}, "temperature must be .*, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be .*, got nan"),
        ({"top_p": 0.0}, "top_p must be .*, got 0.0"),
        ({"top_p": 1.5}, "top_p must be .*, got 1.5"),
        ({"top_p": float("nan")}, "top_p must be .*, got nan"),
        ({"top_k": -1}, "top_k must be .*, got -1"),
        ({"top_k": 4097}, "top_k must be .*4096 tokens, got 4097"),
        ({"min_p": -0.1}, "min_p must be .*, got -0.1"),
        ({"min_p": 1.1}, "min_p must be .*, got 1.1"),
        ({"stop": [""]}, "a stop text must not be empty"),
    ],
)
def test_values_out_of_range_are_refused_before_the_first_token(
    pair: tuple[Any, Any], drafter: Any, options: dict[str, Any], message: str
) -> None:
    for one in (drafter, None):
        with pytest.raises(InputError, match=f"^{message}$"):
            mlx_distill.stream_generate(*pair, PROMPT, drafter=one, **options)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 50.0, 1e30, float("inf")])
@pytest.mark.parametrize("law", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_extreme_temperatures_draw_tokens_that_the_filters_keep(
    pair: tuple[Any, Any], drafter: Any, temperature: float, law: dict[str, float]
) -> None:
    """Whatever is accepted as a temperature must not make the filters leak."""
    for one in (drafter, None):
        options: dict[str, Any] = {"drafter": one, "temperature": temperature, **law}
        try:
            responses = mlx_distill.stream_generate(
                *pair, PROMPT, seed=1, max_tokens=6, prompt_cache=None, **options
            )
        except InputError as refusal:
            assert "temperature must be" in str(refusal)  # noqa: PT017
            continue
        for response in responses:
            rank = (response.logprobs > response.logprobs[response.token]).sum().item()
            if temperature < 1e-3 or law.get("top_k"):
                assert rank < (law.get("top_k", 1) if temperature > 1e-3 else 1)


@pytest.mark.parametrize(
    ("field", "value"), [("beam_width", 0), ("draft_length", 0), ("nodes", 0), ("nodes", -3)]
)
def test_plan_refuses_what_cannot_be_drafted(field: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{field} must be at least 1, got {value}"):
        DraftPlan(**{field: value})


def test_plan_refuses_unknown_trees() -> None:
    with pytest.raises(InputError, match="tree must be best-first, beam or static, got oak"):
        DraftPlan(tree="oak")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_step_size": 0}, "prefill_step_size must be at least 1, got 0"),
        ({"max_kv_size": 0}, "max_kv_size must be at least 8, got 0"),
        ({"max_kv_size": -8}, "max_kv_size must be at least 8, got -8"),
        ({"kv_bits": 7}, "kv_bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        ({"kv_bits": 4, "kv_group_size": 48}, "kv_group_size must be 32, 64 or 128, got 48"),
        ({"kv_bits": 4, "max_kv_size": 64}, "kv_bits and max_kv_size exclude each other"),
    ],
)
def test_cache_config_refuses_what_mlx_cannot_do(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CacheConfig(**options)


def test_drafter_of_another_target_is_refused(pair: tuple[Any, Any], drafter: Any) -> None:
    class Stranger:
        taps, open = (), drafter.open

        def __init__(self, **changes: Any):
            self.target = drafter.target | changes

    for changes, name in [
        ({"hidden_size": 64}, "hidden size is 64, this model's is 384"),
        ({"vocab_size": 32000}, "vocab size is 32000, this model's is 4096"),
        ({"tokenizer_hash": "0123"}, "tokenizer hash is 0123, this model's is"),
    ]:
        with pytest.raises(InputError, match=f"made for another target: its {name}"):
            mlx_distill.stream_generate(*pair, PROMPT, drafter=Stranger(**changes))


# ------------------------------------------------------------------------------------ stop texts


def cut(pieces: list[str], *stop: str) -> tuple[str, bool]:
    """Feed pieces as ``stream_generate`` does; return the text and whether it was stopped."""
    cutter, text = StopCutter(stop), ""
    for place, piece in enumerate(pieces):
        text += cutter.feed(piece, last=place == len(pieces) - 1)
        if cutter.stopped:
            break
    return text, cutter.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["abc", "def"], [], ("abcdef", False)),
        (["abc", "def"], ["x"], ("abcdef", False)),
        (["abc", "def"], ["cd"], ("ab", True)),
        (["abc", "def"], ["abc"], ("", True)),
        (["abc", "def"], ["abcdef"], ("", True)),
        (["a", "b", "c", "d", "e"], ["bcd"], ("a", True)),
        (["abc", "def"], ["def", "bc"], ("a", True)),
        (["abc", "def"], ["f", "e"], ("abcd", True)),
        (["aab"], ["ab"], ("a", True)),
        (["a", "a", "b"], ["ab"], ("a", True)),
        (["aba", "bac"], ["abac"], ("ab", True)),
        (["ab", "x", "ab"], ["abc"], ("abxab", False)),
        (["", "a", ""], ["a"], ("", True)),
        (["ab", ""], ["abc"], ("ab", False)),
        (["日", "本語"], ["本"], ("日", True)),
    ],
)
def test_stop_cutter(pieces: list[str], stop: list[str], expected: tuple[str, bool]) -> None:
    assert cut(pieces, *stop) == expected


def test_stop_cutter_equals_cutting_the_whole_text() -> None:
    """Every way to split every short text over two letters, against str.find."""
    stops = [["ab"], ["aa"], ["aba"], ["ba", "aab"], ["bbb", "b"]]
    for letters in itertools.product("ab", repeat=5):
        text = "".join(letters)
        for splits in itertools.product((False, True), repeat=4):
            ends = [*(place for place, split in enumerate(splits, start=1) if split), 5]
            pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends])]
            assert "".join(pieces) == text
            for stop in stops:
                result, stopped = cut(pieces, *stop)
                assert stopped == any(s in text for s in stop)
                if not stopped:
                    assert result == text
                    continue
                # What is known once the piece that completes the first stop text has come.
                known = next(
                    part for part in itertools.accumulate(pieces) if any(s in part for s in stop)
                )
                assert result == known[: min(known.find(s) for s in stop if s in known)]


def test_stop_cutter_hands_out_early() -> None:
    """Only what could begin a stop text is held back."""
    cutter = StopCutter(["stop"])
    assert cutter.feed("go on") == "go on"
    assert cutter.feed(" st") == " "
    assert cutter.feed("ep") == "step"
    assert cutter.feed("s") == ""
    assert cutter.feed("", last=True) == "s"
