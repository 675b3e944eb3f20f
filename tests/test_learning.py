"""A drafter that learns from what it is used for."""

import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ModelIn
from damage import Run, refused  # noqa: F401
from half_models import REFERENCE
from mlx.utils import tree_flatten

from mlx_distill import DraftPlan, InputError, checkpoint, stream_generate
from mlx_distill.distillation import learning as module
from mlx_distill.distillation.learning import Learner
from mlx_distill.distillation.learning_folder import Learned
from mlx_distill.distillation.recording import HeardText, Recording
from mlx_distill.distillation.replay import Replay
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.fingerprint import fingerprint
from mlx_distill.drafters.learning_config import LearningConfig
from mlx_distill.drafters.mixture import MixedDrafter
from mlx_distill.drafters.ngram import NGramDrafter
from mlx_distill.drafters.recurrent import RecurrentDrafter, RecurrentDrafterConfig
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.files import write_arrays
from mlx_distill.target.target import Target

generate = importlib.import_module("mlx_distill.generate")

BLOCKS = {"taps": (0,), "context_blocks": 1, "context_window": 8}
FORMS = {"plain": {}, "taps and a block": {"cell": "gru", "context_state": True, **BLOCKS}}
QUICK = LearningConfig(learn_least=2, learn_steps=2, learn_seconds=60.0)


def random_drafter(model: Any, tokenizer: Any, **shape: Any) -> BoundDrafter:
    """Return a drafter with random weights, in the model's type, of half the tokens."""
    target = Target.of(model)
    assert target.embed is not None
    config = RecurrentDrafterConfig(
        hidden_size=64,
        vocab_size=4096,
        exit_dim=32,
        num_draft_layers=1,
        draft_vocab_size=2048,
        **shape,
    )
    mx.random.seed(5)
    network = RecurrentDrafter(config)
    network.set_dtype(target.embed(mx.array([0])).dtype)
    return BoundDrafter(network, target.embed, fingerprint(target, tokenizer))


def weights(network: RecurrentDrafter) -> dict[str, bytes]:
    named: dict[str, mx.array] = dict(tree_flatten(network.trainable_parameters()))
    return {name: np.array(array.astype(mx.float32)).tobytes() for name, array in named.items()}


def written(pair: tuple[Any, Any], drafter: Any, learner: Learner | None, **law: Any) -> list[int]:
    """Return the tokens of a text; the learner listens."""
    responses = stream_generate(*pair, [1, 5, 9], drafter=drafter, plan=DraftPlan(), **law)
    return [one.token for one in (learner.listen(responses) if learner else responses)]


@pytest.fixture
def small(model_in: ModelIn) -> tuple[Any, Any]:
    return checkpoint.load(model_in("tiny", "float16"))


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled() -> Iterator[None]:
    """See ``not_compiled``."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True)
def few_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTS", 16)


LAWS: list[dict[str, Any]] = [
    {"max_tokens": 5},
    {"max_tokens": 6, "temperature": 0.8, "seed": 1},
    {"max_tokens": 6, "temperature": 1.0, "seed": 4, "top_p": 0.9},
]


@pytest.mark.parametrize(
    ("weights_type", "form"),
    [("bfloat16", "taps and a block"), ("4-bit", "plain")],
)
def test_the_text_never_changes(
    as_on_a_gpu: None, model_in: ModelIn, weights_type: str, form: str, tmp_path: Path
) -> None:
    """Greedy and drawn, before and after what was learned, and without learning."""
    pair = checkpoint.load(model_in("tiny", weights_type))
    drafter = random_drafter(*pair, **FORMS[form])
    before, rounds = weights(drafter.network), []
    expected = [written(pair, drafter, None, **law) for law in LAWS]
    with Learner(tmp_path / "learned", drafter, *pair, QUICK) as learner:
        for repeat in range(2):
            for law, tokens in zip(LAWS, expected, strict=True):
                assert written(pair, learner.drafter, learner, **law) == tokens, (repeat, law)
                rounds.append(learner.learn())
        assert any(one is not None and one.kept for one in rounds)
        assert weights(learner.drafter.network) != before
    assert weights(drafter.network) == before, "the original is never touched"


def test_it_learns_beside_ngrams(small: tuple[Any, Any], tmp_path: Path) -> None:
    """Whose drafts they were, the text tells as much; nothing of it changes."""
    drafter, prompt, rounds = random_drafter(*small), [1, 5, 9, 1, 5, 9, 1, 5], []

    def answer(learner: Learner | None, seed: int) -> list[int]:
        ngrams = NGramDrafter(shortest=2, store_tokens=0)
        mixed = MixedDrafter(learner.drafter if learner else drafter, ngrams)
        law = {"temperature": 1.0, "seed": seed, "top_k": 2, "max_tokens": 12}
        responses = stream_generate(*small, prompt, drafter=mixed, plan=DraftPlan(), **law)
        return [one.token for one in (learner.listen(responses) if learner else responses)]

    with Learner(tmp_path / "learned", drafter, *small, QUICK) as learner:
        before = weights(learner.drafter.network)
        for seed in range(6):
            learned = any(one is not None and one.kept for one in rounds)
            assert answer(learner, seed) == answer(None, seed)
            if learned:  # and it was with what was learned
                break
            rounds.append(learner.learn())
        assert learned
        assert weights(learner.drafter.network) != before


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_what_the_target_says_of_the_text(
    small: tuple[Any, Any], form: str, tmp_path: Path
) -> None:
    """Also where filters made it draw again, and take back what was accepted."""
    model, tokenizer = small
    drafter = random_drafter(model, tokenizer, **FORMS[form])
    prompt = list(range(5, 17))
    with Learner(tmp_path / "learned", drafter, model, tokenizer, QUICK) as learner:
        law = {"temperature": 1.0, "seed": 3, "top_p": 0.7, "max_tokens": 24}
        responses = stream_generate(
            model, tokenizer, prompt, drafter=learner.drafter, plan=DraftPlan(), **law
        )
        answer = [one.token for one in learner.listen(responses)]
        learner.learn()
    (file,) = (tmp_path / "learned" / "texts").iterdir()
    found: Any = mx.load(str(file))
    text, tokens = [*prompt, *answer], found["tokens"].tolist()
    known = drafter.look_back - 1 if form != "plain" else 0
    known = min(known, len(prompt) - 1)
    first = len(prompt) - 1 - known
    assert len(tokens) >= len(text) - first - 2
    assert tokens[: len(text) - first] == text[first:][: len(tokens)]
    whole = [*text[:first], *tokens]
    _, hidden = Target.of(model).read(mx.array([whole]))
    np.testing.assert_allclose(found["hidden"].astype(mx.float32), hidden[0, first:], atol=0.05)
    count = len(tokens) - known
    assert found["ahead"].tolist() == [-1] * known + list(range(count - 1, -1, -1))


def test_it_goes_on_from_its_folder(small: tuple[Any, Any], tmp_path: Path) -> None:
    """And the folder is a drafter's."""
    drafter, folder = random_drafter(*small, **FORMS["taps and a block"]), tmp_path / "learned"

    def use(count: int) -> tuple[list[Learned | None], BoundDrafter]:
        with Learner(folder, drafter, *small, QUICK) as learner:
            rounds = []
            for seed in range(count):
                written(small, learner.drafter, learner, temperature=1.0, seed=seed, max_tokens=20)
                rounds.append(learner.learn())
            return rounds, learner.drafter

    first, learned = use(4)
    assert [one is None for one in first] == [True, True, False, False]
    with Learner(folder, drafter, *small, QUICK) as learner:
        assert weights(learner.drafter.network) == weights(learned.network)
    second, learned = use(1)
    assert second[0] is not None
    assert second[0].before == pytest.approx([one for one in first if one and one.kept][-1].after)
    loaded: Any = load_drafter(folder, *small)
    assert weights(loaded.network) == weights(learned.network)
    record = json.loads((folder / "learning.json").read_text())
    assert record["answers"] == 5
    assert record["kept"] + record["taken_back"] == 3


def test_what_makes_drafts_worse_is_taken_back(small: tuple[Any, Any], tmp_path: Path) -> None:
    drafter = random_drafter(*small)
    config = LearningConfig(learn_least=2, learn_steps=3, learn_rate=1.0, learn_seconds=60.0)
    with Learner(tmp_path / "learned", drafter, *small, QUICK) as learner:
        for seed in range(5):  # until it drafts something that can be lost
            written(small, learner.drafter, learner, seed=seed, temperature=0.3, max_tokens=16)
            learner.learn()
    with Learner(tmp_path / "learned", drafter, *small, config) as learner:
        before, rounds = weights(learner.drafter.network), []
        for seed in range(3):
            written(small, learner.drafter, learner, temperature=1.0, seed=seed, max_tokens=16)
            rounds.append(learner.learn())
            if rounds[-1] is not None and not rounds[-1].kept:
                break
        assert rounds[-1] is not None
        assert not rounds[-1].kept
        if len(rounds) == 1:
            assert weights(learner.drafter.network) == before
            written(small, learner.drafter, learner, temperature=1.0, seed=9, max_tokens=16)
            again = learner.learn()
            assert again is not None
            assert again.before == pytest.approx(rounds[0].before, rel=0.5)


def test_nothing_is_learned_of_what_is_no_number(
    small: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stay in the optimiser's moments, and every later round would be taken back."""
    heard = Recording.text
    with Learner(tmp_path / "learned", random_drafter(*small), *small, QUICK) as learner:
        for array in ("hidden", "taps"):
            written(small, learner.drafter, learner, max_tokens=6)

            def overflown(recording: Recording, array: str = array) -> HeardText:
                text = heard(recording)
                wrong = text.hidden.at[2, 1].add(mx.inf)
                return replace(text, **{array: wrong if array == "hidden" else (wrong,)})

            monkeypatch.setattr(Recording, "text", overflown)
            assert learner.learn() is None
            monkeypatch.setattr(Recording, "text", heard)
    assert not (tmp_path / "learned" / "texts").exists()


def test_old_answers_make_room(small: tuple[Any, Any], tmp_path: Path) -> None:
    drafter, config = random_drafter(*small), LearningConfig(learn_mb=0.01, learn_least=100)
    texts = tmp_path / "learned" / "texts"
    with Learner(tmp_path / "learned", drafter, *small, config) as learner:
        for seed in range(6):
            written(small, learner.drafter, learner, temperature=1.0, seed=seed, max_tokens=20)
            assert learner.learn() is None
    names = sorted(path.name for path in texts.iterdir())
    assert names[-1] == "0000005.safetensors"
    assert 1 < len(names) < 6
    assert sum(path.stat().st_size for path in texts.iterdir()) <= 10_000


def command(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, str]:
    """Return what ``generate`` wrote, and what it said."""
    little = ["--learn-least", "1", "--learn-steps", "1"] if "--learn" in flags else []
    assert generate.main(["--max-tokens", "16", "--no-calibrate", *little, *flags]) == 0
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.usefixtures("bundled_once")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "learned"
    plain, _ = command(capsys)
    said = []
    for _ in range(3):
        text, err = command(capsys, "--learn", str(folder))
        assert text == plain
        said.append("on held-out answers" in err)
    assert said == [False, True, True]
    text, err = command(capsys, "--learn", str(folder), "--reset-learning")
    assert text == plain
    assert "held-out" not in err
    assert len(list((folder / "texts").iterdir())) == 1


@pytest.mark.usefixtures("bundled_once")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--learn DIR --no-drafter", "--learn needs a drafter that can learn; leave --no-drafter"),
        ("--learn DIR --draft-model DIR", "leave --draft-model out"),
        ("--learn DIR --drafter ngram", "a NGramDrafter cannot learn from use"),
        ("--reset-learning", "--reset-learning needs --learn"),
        ("--learn DIR --learn-mb 0", "learn_mb must be above 0"),
        ("--learn DIR/full", "holds something else than what was learned"),
        ("--learn DIR/full --reset-learning", "holds something else than what was learned"),
        ("--learn DIR/full/file", "nothing can be learned in .*file"),
        ("--learn DIR/other", "what another drafter has learned; .*--reset-learning starts anew"),
        ("--learn DIR/model", "what a model of other weights has learned"),
        ("--learn DIR/damaged", "learning.json .*--reset-learning|does not say what it has to"),
        ("--learn DIR/cut", "is damaged: .*--reset-learning starts anew"),
        ("--learn DIR/text", "is damaged"),
    ],
)
def test_what_cannot_be_learned(
    refused: Run,  # noqa: F811
    flags: str,
    sentence: str,
    folders: Path,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folders.rglob("*") if path.is_file()}
    found = refused(generate.main, *flags.replace("DIR", str(folders)).split())
    assert re.search(sentence, found), found
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("hidden", lambda x: None, "it holds ahead, tap-0, tokens"),
        ("hidden", lambda x: x[:, :-1], r"the widths \[63, 64\]"),
        ("tap-0", lambda x: x[:, :-1], r"the widths \[64, 63\]"),
        ("tap-0", lambda x: x.astype(mx.int32), "no numbers"),
        ("hidden", lambda x: x[1:], "do not fit each other"),
        ("tokens", lambda x: x[None], "do not fit each other"),
        ("tokens", lambda x: x.astype(mx.float32), "do not fit each other"),
        ("tokens", lambda x: x + 10**8, "tokens that the model does not have"),
        ("tokens", lambda x: x - 10**8, "tokens that the model does not have"),
        ("ahead", lambda x: x + 1, "rows that are not there"),
        ("ahead", lambda x: x - 2, "rows that are not there"),
        ("hidden", lambda x: x + mx.nan, "not all finite"),
        ("tap-0", lambda x: x - mx.inf, "not all finite"),
    ],
)
def test_a_damaged_text_is_named(
    tmp_path: Path, name: str, changed: Callable[[mx.array], mx.array | None], reason: str
) -> None:
    """Before anything is read from it: what lies beyond an array would end the process."""

    def opened() -> Replay:
        return Replay(tmp_path, 10**6, lambda ids: ids, mx.float32, 97, [64, None])

    text = HeardText([3, 5, 7, 9], mx.zeros((4, 64)), (mx.zeros((4, 64)),), 2)
    replay = opened()
    for _ in range(2):
        replay.add(text)
    (tmp_path / "0000001 copy.safetensors").write_text("nobody's")
    assert opened().numbers(held_out=None) == [0, 1]
    path = tmp_path / "0000001.safetensors"
    arrays: dict[str, Any] = {**mx.load(str(path))}  # pyright: ignore
    arrays[name] = changed(arrays[name])
    write_arrays(path, {key: x for key, x in arrays.items() if x is not None})
    with pytest.raises(InputError, match=f"0000001.safetensors is damaged: .*{reason}"):
        opened()


@pytest.fixture(scope="module")
def folders(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of folders that cannot be learned in."""
    tmp_path = tmp_path_factory.mktemp("folders")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name in ("other", "model", "damaged", "cut", "text"):
        shutil.copytree(learned, tmp_path / name)
    for name, key, value in (
        ("other", "drafter", "x"),
        ("model", "target", {}),
        ("damaged", "answers", "3"),
    ):
        file = tmp_path / name / "learning.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    for file in (
        tmp_path / "cut" / "model.safetensors",
        tmp_path / "text/texts/0000001.safetensors",
    ):
        file.write_bytes(file.read_bytes()[:-4])
    return tmp_path


@pytest.fixture(scope="module")
def learned(bundled_pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two answers and a round."""
    folder = tmp_path_factory.mktemp("learned") / "learned"
    drafter = load_drafter(REFERENCE, *bundled_pair)
    config = LearningConfig(learn_least=1, learn_steps=1, learn_rate=1e-7)
    with Learner(folder, drafter, *bundled_pair, config) as learner:
        for seed in range(3):
            written(
                bundled_pair, learner.drafter, learner, temperature=1.0, seed=seed, max_tokens=9
            )
            learner.learn()
        with pytest.raises(InputError, match="is being written by another run"):
            Learner(folder, drafter, *bundled_pair)
    assert (folder / "model.safetensors").exists()
    return folder
