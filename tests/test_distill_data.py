"""The data of ``distill``: texts, answers, and the answers of a teacher that are kept."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distilling import (
    STORIES,
    TINY,
    Refuse,
    arguments,
    learn,
    log_of,
    main,
    save,
    weights_of,
    without,
    write_rows,
    write_yaml,
)

from mlx_distill.data.tokens import encode_behind

pytestmark = pytest.mark.usefixtures("no_hub", "no_curves")

# ------------------------------------------------------------------------------------------- data


def test_empty_data(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    argv = arguments(world, tmp_path / "student", "--data", empty)
    assert refuses(argv) == f"{empty} holds no texts"
    assert f"{empty} leaves no completions of 0 rows: empty" in refuses(
        [*argv, "--data-layout", "completions"]
    )


def test_too_few_texts_to_hold_some_out(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    data = write_rows(tmp_path / "few.jsonl", [{"text": text} for text in STORIES[:5]])
    argv = arguments(world, tmp_path / "student", "--data", data)
    assert refuses(argv) == "5 texts are too few: 64 are held out"
    assert refuses([*argv, "--held-out", "5"]) == "5 texts are too few: 5 are held out"


def test_held_out_texts_are_chosen_by_a_seed_of_their_own(world: Path, tmp_path: Path) -> None:
    parts = [
        write_rows(tmp_path / f"{n}.jsonl", [{"text": t} for t in STORIES[n::2]]) for n in (0, 1)
    ]
    options = ["--data", *parts, "--held-out", "4", "--steps", "1"]
    before = []
    for name, seeds in (("1", []), ("2", ["--seed", "5"]), ("3", ["--held-out-seed", "1"])):
        output = tmp_path / name
        argv = arguments(world, output, *options, "--student-layers", "0", *seeds)
        assert main(without(argv, "--student-config")) == 0
        run = json.loads((output / "training.json").read_text())
        assert run["texts"]["held_out"]["kept"] == 4
        assert run["texts"]["kept"] == 8
        before.append(run["held_out"]["before"]["nats"])
    assert before[0] == before[1] != before[2]


def test_home_folder_of_a_file(
    world: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands the tilde, a file of options does not; valid.jsonl is found all the same."""
    monkeypatch.setenv("HOME", str(world))
    path = write_yaml(tmp_path / "run.yaml", {"data": "~/texts"})
    argv = without(arguments(world, tmp_path / "student", "--steps", "1"), "--data")
    assert main([*argv, "--config", str(path)]) == 0
    runs = [
        json.loads((one / "training.json").read_text()) for one in (tmp_path / "student", finished)
    ]
    assert runs[0]["texts"] == runs[1]["texts"]
    assert runs[0]["held_out"]["before"] == runs[1]["held_out"]["before"]
    assert log_of(tmp_path / "student")[0]["loss"] == log_of(finished)[0]["loss"]


def test_bad_rows_are_named(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    data = write_rows(tmp_path / "bad.jsonl", [{"text": "A dog."}, {"story": "A cat."}])
    sentence = refuses(arguments(world, tmp_path / "student", "--data", data))
    assert sentence == (
        f"{data}, line 2: expected text, prompt and completion, or messages, got ['story']"
    )


@pytest.mark.parametrize("more", [[], ["--cache-teacher", "{}/cache"]])
@pytest.mark.parametrize("layout", ["texts", "completions"])
def test_arguments_of_no_template(
    world: Path, tmp_path: Path, refuses: Refuse, layout: str, more: list[str]
) -> None:
    """They would change nothing."""
    argv = arguments(world, tmp_path / "student", "--data-layout", layout)
    argv += [one.format(tmp_path) for one in more]
    assert refuses([*argv, "--chat-template-config", '{"enable_thinking": false}']) == (
        "--chat-template-config needs a tokenizer with a chat template; this has none"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("long", "kept"), [("cut", 12), ("drop", 4)])
def test_long_texts_are_counted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], long: str, kept: int
) -> None:
    output = learn(
        world, tmp_path / "student", "--steps", "4", "--max-length", "12", "--long", long
    )
    what, done = ("changed", "cut to") if long == "cut" else ("dropped", "longer than")
    err = capsys.readouterr().err
    assert f"12 rows read, {kept} texts kept, {12 - kept} dropped\n8 {done} 12 tokens: " in err
    counts = json.loads((output / "training.json").read_text())["texts"]
    assert (counts["rows"], counts["kept"]) == (12, kept)
    assert counts[what][f"{done} 12 tokens"]["count"] == 8
    assert f"{kept} texts of 12 rows (8 {done} 12 tokens)" in (output / "README.md").read_text()
    per_epoch = math.ceil(kept / 3)
    assert sum(row["count"] for row in log_of(output)[:per_epoch]) <= kept * 11


def test_long_texts_are_refused(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    argv = arguments(world, tmp_path / "student", "--max-length", "12", "--long", "refuse")
    assert refuses(argv) == (
        "8 of 12 texts are longer than 12 tokens; cut or drop them with --long, or raise "
        "--max-length"
    )
    argv = arguments(world, tmp_path / "student", "--max-length", "2", "--long", "drop")
    assert refuses(argv).startswith("none of 12 texts has anything to learn: ")


def test_packed_texts(world: Path, tmp_path: Path, tokenizer: Any) -> None:
    more = ["--pack", "--max-length", "33", "--batch-size", "2", "--steps", "4"]
    output = learn(world, tmp_path / "student", *more)
    stream = [
        token for text in STORIES for token in [*tokenizer.encode(text), tokenizer.eos_token_id]
    ]
    num_rows = math.ceil((len(stream) - 1) / 32)  # a row begins with the last token of another
    per_epoch = math.ceil(num_rows / 2)
    counts = [row["count"] for row in log_of(output)]
    assert sum(counts[:per_epoch]) == len(stream) - len(STORIES)  # no text's first is learned


def test_answers_alone_are_learned(world: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": text[:10], "completion": text[10:]} for text in STORIES]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    options = ["--data", data, "--valid", world / "texts" / "valid.jsonl", "--steps", "4"]
    counts = []
    for name, flags in (("answers", []), ("all", ["--learn-prompts"])):
        output = learn(world, tmp_path / name, *options, *flags)
        counts.append(sum(row["count"] for row in log_of(output)[:4]))
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    assert counts[1] - counts[0] == sum(map(len, prompts)) - len(rows)
    answers = [
        encode_behind(tokenizer, row["prompt"], prompt, row["completion"])
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    assert counts[0] == sum(map(len, answers)) + len(rows)


def test_stored_completions(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"input": text[:10], "output": text[10:]} for text in STORIES]
    bad = [
        {"input": "Hi", "output": "I'm sorry, but I cannot help with that."},
        {"input": "Hi"},
        good[0],
        {"story": "A cat."},
    ]
    data = write_rows(tmp_path / "stored.jsonl", [*good, *bad])
    valid = write_rows(tmp_path / "valid.jsonl", good[:3])
    more = ["--data", data, "--valid", valid, "--data-layout", "completions", "--loss", "hard"]
    more += ["--steps", "1"]
    argv = arguments(world, tmp_path / "student", *more, "--tokenizer", world / "teacher")
    assert main(without(argv, "--teacher")) == 0
    err = capsys.readouterr().err
    assert "16 rows read, 12 texts kept, 4 dropped" in err
    assert f"1 refusal: {data}, line 13" in err
    assert f"1 duplicate: {data}, line 15" in err
    assert f"2 unknown layout: {data}, line 14; {data}, line 16" in err
    assert "3 rows read, 3 held-out texts kept, 0 dropped" in err
    run = json.loads((tmp_path / "student" / "training.json").read_text())
    assert run["texts"]["kept"] == 12
    assert set(run["held_out"]["after"]) == {"nats", "perplexity"}
    assert "Teacher: stored text only" in (tmp_path / "student" / "README.md").read_text()


def test_stored_completions_are_filtered(
    world: Path, tmp_path: Path, refuses: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"input": text[:10], "output": text[10:], "metadata": {"score": str(number)}}
        for number, text in enumerate(STORIES)
    ]
    data = write_rows(tmp_path / "data" / "train.jsonl", rows).parent
    write_rows(tmp_path / "data" / "valid.jsonl", rows[-2:])
    more = ["--data", data, "--data-layout", "completions", "--steps", "1"]
    more += ["--where", "score >= 6"]
    output = learn(world, tmp_path / "student", *more)
    assert "12 rows read, 6 texts kept, 6 dropped" in capsys.readouterr().err
    assert json.loads((output / "training.json").read_text())["texts"]["kept"] == 6
    argv = arguments(world, tmp_path / "none", *more[:-1], "score >= 60")
    assert "leaves no completions of 12 rows: 12 where is false" in refuses(argv)
    argv = arguments(world, tmp_path / "none", *more[:-1], "open('x')")
    assert "where" in refuses(argv)


# ------------------------------------------------------------------------------ the teacher's cache


def cache(world: Path, folder: Path, *more: Any) -> int:
    argv = without(arguments(world, folder, *more), "--output")
    return main([*argv, "--cache-teacher", str(folder)])


@pytest.fixture(scope="module")
def cached(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "cache"
    assert cache(world, folder, "--cache-k", "32") == 0
    return folder


def use(world: Path, folder: Path, output: Path, *more: Any) -> list[str]:
    argv = arguments(world, output, "--use-cache", folder, "--loss", "sparse_kl", *more)
    return argv


def test_cached_teacher(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    folder = tmp_path / "deep" / "cache"
    assert cache(world, folder, "--cache-k", "4096") == 0
    out = capsys.readouterr().out
    assert re.search(r"cache: 12 texts, \d+ bytes per token", out)
    assert not [path for path in tmp_path.iterdir() if path.name != "deep"]
    assert main(use(world, folder, tmp_path / "student")) == 0
    losses = [[row["loss"] for row in log_of(path)] for path in (tmp_path / "student", finished)]
    np.testing.assert_allclose(*losses, rtol=5e-3)  # all tokens, in half precision
    assert set(log_of(tmp_path / "student")[-1]["held_out"]) == {
        "nats",
        "kl",
        "agreement",
        "perplexity",
    }


def test_cache_without_its_teacher(world: Path, tmp_path: Path, cached: Path) -> None:
    """Teacher and student need not be in memory together."""
    more = ["--tokenizer", world / "teacher", "--steps", "2"]
    argv = use(world, cached, tmp_path / "student", *more)
    assert main(without(argv, "--teacher")) == 0
    log = log_of(tmp_path / "student")
    assert set(log[-1]["held_out"]) == {"nats", "perplexity"}
    assert main(use(world, cached, tmp_path / "judged", "--steps", "2")) == 0
    assert weights_of(tmp_path / "judged") == weights_of(tmp_path / "student")


def test_caching_again_does_nothing_more(
    world: Path, cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in cached.glob("shard-*")}
    capsys.readouterr()
    assert cache(world, cached, "--cache-k", "32") == 0
    assert {path.name: path.stat().st_mtime_ns for path in cached.glob("shard-*")} == before
    assert before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--max-texts", "11"],
            "was made of other texts, or of the same ones cut, marked or ordered",
        ),
        (
            ["--max-length", "9"],
            "was made of other texts, or of the same ones cut, marked or ordered",
        ),
        (
            ["--pack"],
            "was made of other texts, or of the same ones cut, marked or ordered otherwise",
        ),
        (["--loss", "sparse_kl:k=33"], "sparse_kl asks for 33 tokens per position, the cache has"),
        (["--loss", "sparse_kl", "hidden_mse"], "hidden_mse compares features, so it needs a live"),
    ],
)
def test_cache_of_something_else(
    world: Path, tmp_path: Path, refuses: Refuse, cached: Path, more: list[str], sentence: str
) -> None:
    assert sentence in refuses(use(world, cached, tmp_path / "student", *more))
    assert not list(tmp_path.iterdir())


def test_cache_of_another_tokenizer(
    world: Path, tmp_path: Path, refuses: Refuse, cached: Path
) -> None:
    (tmp_path / "bytes.json").write_text(json.dumps(TINY | {"vocab_size": 258}))
    more = ["--student-config", tmp_path / "bytes.json", "--tokenizer", world / "bytes"]
    argv = without(use(world, cached, tmp_path / "student", *more), "--teacher")
    assert "was made with another tokenizer, so its token ids mean other tokens" in refuses(argv)


def test_cache_of_another_teacher_is_not_continued(
    world: Path, refuses: Refuse, cached: Path
) -> None:
    argv = without(arguments(world, cached, "--teacher", world / "second"), "--output")
    sentence = refuses([*argv, "--cache-teacher", str(cached), "--cache-k", "32"])
    assert "was made from another teacher; remove it or name another folder" in sentence


def test_a_teacher_that_does_not_know_the_tokens_is_not_cached(
    world: Path, tmp_path: Path, refuses: Refuse, tokenizer: Any
) -> None:
    narrow = save(tmp_path / "narrow", TINY | {"vocab_size": 300}, 1, tokenizer)
    argv = without(arguments(world, tmp_path / "x", "--teacher", narrow), "--output")
    sentence = refuses([*argv, "--cache-teacher", str(tmp_path / "cache")])
    assert sentence.startswith("the texts hold token ")
    assert not (tmp_path / "cache").exists()


def test_several_teachers_are_not_cached(world: Path, tmp_path: Path, refuses: Refuse) -> None:
    teachers = ["--teacher", world / "teacher", world / "second"]
    argv = without(arguments(world, tmp_path / "x", *teachers), "--output")
    sentence = refuses([*argv, "--cache-teacher", str(tmp_path / "cache")])
    assert sentence == "a cache holds one teacher's answers; name it with --teacher"


def test_what_a_student_will_write_is_not_cached(
    world: Path, tmp_path: Path, refuses: Refuse
) -> None:
    """Of questions alone there is nothing to keep; it was a traceback."""
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": "Who ran?"}] * 3)
    argv = arguments(world, tmp_path / "x", "--data", asked, "--on-policy", "0.5")
    sentence = refuses([*without(argv, "--output"), "--cache-teacher", str(tmp_path / "cache")])
    assert "not about what the student will write; leave --on-policy out" in sentence
    assert not (tmp_path / "cache").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damaged_shard_is_named_and_made_again(
    world: Path, tmp_path: Path, refuses: Refuse, cached: Path, damage: str
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cached, folder)
    (shard,) = folder.glob("shard-*")
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        data[-40] ^= 0xFF
        shard.write_bytes(data)
    else:
        shard.unlink()
    sentence = refuses(use(world, folder, tmp_path / "student"))
    assert sentence.startswith(f"{shard} is ")
    assert "running the same --cache-teacher command again rebuilds this file alone" in sentence
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    assert cache(world, folder, "--cache-k", "32") == 0
    assert contents(folder) == contents(cached)
