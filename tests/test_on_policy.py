"""What a student writes itself: where it goes on, how far, and what of it is learned."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill import TrainingConfig, checkpoint, distill
from mlx_distill.data.chats import Chat
from mlx_distill.data.report import Report
from mlx_distill.data.texts import Source, Text
from mlx_distill.distillation.on_policy import (
    OnPolicyConfig,
    Prompt,
    Rollouts,
    answered,
    prompt_of,
    with_room,
    written_text,
)
from mlx_distill.distillation.students import from_config
from mlx_distill.errors import InputError

EOS = {2}
MESSAGES = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
CHAT = Text(
    list(range(10, 22)),
    [False] * 4 + [True] * 2 + [False] * 3 + [True] * 3,
    Source("here", Chat(MESSAGES), True, True, ((1, 4, 6), (3, 9, 12))),
)
QUESTION = Text([5, 6, 7], [False] * 3, Source("here", Chat(MESSAGES[:1]), True))
TABLE = {
    **{"model_type": "gpt2", "n_ctx": 20, "n_embd": 32, "n_head": 2, "n_layer": 1},
    **{"n_positions": 20, "layer_norm_epsilon": 1e-5, "vocab_size": 64},
}


def llama(**fields: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "rms_norm_eps": 1e-5}
    return from_config({"model_type": "llama", **sizes, **heads, **fields})


def rollouts(folder: Path, student: Any, texts: list[Text], **options: Any) -> Rollouts:
    config = OnPolicyConfig(1.0, rollout_texts=4, rollout_max_tokens=9, rollout_every=2)
    return Rollouts(student, texts, lambda number: [0], 3, EOS, config, folder, 7, **options)


def run(folder: Path, student: Any, teacher: Any, texts: list[Text], **options: Any) -> Any:
    return distill(
        student,
        teacher,
        texts,
        folder=folder,
        training=TrainingConfig(steps=3),
        batch_size=2,
        eos_token_ids=sorted(EOS),
        quiet=True,
        **options,
    )


def test_every_answer_of_a_chat_is_gone_on_with() -> None:
    draws = np.random.default_rng(0)
    found = {(p.message, len(p.tokens)) for p in (prompt_of(CHAT, 0, 2, draws) for _ in range(30))}
    assert found == {(1, 4), (3, 9)}
    assert prompt_of(CHAT, 0, 2) == Prompt(0, CHAT.tokens[:9], 3)
    assert prompt_of(QUESTION, 0, 2) == Prompt(0, QUESTION.tokens, 1)
    assert prompt_of(Text([*range(9)]), 0, 4) == Prompt(0, [0, 1, 2, 3], None)
    assert prompt_of(Text([*range(3)]), 0, 4) == Prompt(0, [0, 1], None)


def test_an_answer_is_found_where_its_question_is_learned_or_one_token() -> None:
    """A chat is no document, of which the first tokens are gone on with."""
    draws = np.random.default_rng(0)
    whole = Text(CHAT.tokens, source=CHAT.source)
    found = {(p.message, len(p.tokens)) for p in (prompt_of(whole, 0, 2, draws) for _ in range(30))}
    assert found == {(1, 4), (3, 9)}
    source = Source("here", Chat(MESSAGES[:2]), answers=((1, 1, 5),))
    assert prompt_of(Text.behind([*range(5)], 1, source), 0, 3) == Prompt(0, [0], 1)


@pytest.mark.parametrize(("tokens", "ended"), [([30, 2], True), ([30, 31], False)])
def test_written_answer_knows_its_chat(tokens: list[int], ended: bool) -> None:
    prompt = prompt_of(CHAT, 0, 2)
    text = written_text(CHAT, prompt, [*prompt.tokens, *tokens], EOS)
    assert text == Text.behind([*CHAT.tokens[:9], *tokens], 9)
    assert text.source is not None
    assert text.source.ended is ended
    assert text.source.answers == ((3, 9, 11),)
    assert text.source.chat == Chat(MESSAGES[:3])


def test_questions_alone_are_enough(tmp_path: Path) -> None:
    """What is held out is answered by the teacher, once."""
    questions = [Text([5, 6, number], [False] * 3) for number in range(7, 15)]
    teacher = llama(hidden_size=64)
    done = run(
        tmp_path / "all",
        llama(),
        teacher,
        questions[2:],
        valid=questions[:2],
        on_policy=OnPolicyConfig(1.0, rollout_max_tokens=8),
    )
    assert done.finished
    assert done.before["kl"] > 0
    for options in ({}, {"on_policy": OnPolicyConfig(0.5)}):
        with pytest.raises(InputError, match="the texts are questions alone"):
            run(tmp_path / "some", llama(), teacher, questions, **options)
    mixed = [*questions, *[Text([5, 6, 7, 8])] * 2]
    share = OnPolicyConfig(0.5, rollout_max_tokens=8, rollout_every=1)
    assert all(
        row["count"] > 0
        for row in run(tmp_path / "mix", llama(), teacher, mixed, on_policy=share).log
    )


def test_questions_are_answered_where_there_is_nothing_to_judge() -> None:
    writer = llama()
    texts = [CHAT, QUESTION]
    config = OnPolicyConfig(rollout_max_tokens=5)
    kept, new = answered(texts, writer, EOS, config)
    assert kept is CHAT
    assert new.tokens[:3] == QUESTION.tokens
    assert 1 <= new.num_learned <= 5
    assert answered(texts, writer, EOS, config) == [kept, new]
    with pytest.raises(InputError, match="no held-out question leaves room for an answer"):
        answered([QUESTION], writer, EOS, config, limit=3)


def test_questions_that_leave_no_room_are_counted() -> None:
    long = Text([5] * 4, [False] * 4, Source("there, line 7"))
    full = Text([5] * 4, [False] * 3 + [True])
    report = Report(rows=3, kept=3)
    assert with_room([long, QUESTION, full], 4, report) == [QUESTION, full]
    assert with_room([long, QUESTION, full], None, report) == [long, QUESTION, full]
    assert report.sentence() == "2 texts of 3 rows (1 no room for an answer within 4 tokens)"
    held = Report(rows=2, kept=2)
    (kept,) = answered([long, QUESTION], llama(), EOS, OnPolicyConfig(), 4, held)
    assert kept.tokens[:3] == QUESTION.tokens
    assert held.to_dict()["dropped"] == {
        "no room for an answer within 4 tokens": {"count": 1, "places": ["there, line 7"]}
    }


def test_a_training_says_which_questions_left_no_room(tmp_path: Path) -> None:
    """To a caller in Python, too, as the command does from the files."""
    long = Text([5] * 20, [False] * 20, Source("there, line 7"))
    share = OnPolicyConfig(1.0, rollout_max_tokens=4)
    made = (llama(), from_config(TABLE))
    done = run(tmp_path / "some", *made, [long, QUESTION], valid=[QUESTION, long], on_policy=share)
    reason = "1 no room for an answer within 20 tokens"
    assert done.notes[:2] == [
        f"of 2 texts are not used: {reason}",
        f"of 2 held-out texts are not used: {reason}",
    ]
    with pytest.raises(InputError, match=f"nothing is left to learn: {reason}"):
        run(tmp_path / "none", *made, [long], on_policy=share)


def test_writing_ends_with_the_learned_positions(tmp_path: Path) -> None:
    texts = [Text.behind([5] * (n - 1) + [6], n - 1) for n in (12, 16, 19, 20)]
    written = rollouts(tmp_path, from_config(TABLE), texts, limit=20)
    for number in range(4):
        batch = written.batch(number)
        assert batch.inputs.shape[1] <= 20
        assert all(11 < len(text.tokens) <= 20 for text in batch.texts)
    only = [Text([5] * 24, [False] * 24)]
    with pytest.raises(InputError, match="no prompt leaves room for an answer within 20 tokens"):
        rollouts(tmp_path, from_config(TABLE), only, limit=20).batch(8)


def test_training_stays_within_the_shortest_table(tmp_path: Path) -> None:
    """That of the teacher; nothing is padded beyond it."""
    texts = [Text([5, 6, 7, 8, 9 + number]) for number in range(4)]
    share = OnPolicyConfig(1.0, rollout_prompt_tokens=4, rollout_max_tokens=60, rollout_texts=4)
    done = run(tmp_path, llama(), from_config(TABLE), texts, on_policy=share, valid=texts)
    assert all(0 < row["count"] <= 2 * 16 for row in done.log)
    with pytest.raises(InputError, match="the longest text has 21 tokens, but a Model of 20 posit"):
        run(tmp_path / "long", llama(), from_config(TABLE), [Text([5] * 21)])


def test_students_in_the_types_of_a_gpu_write(tmp_path: Path, tiny_on_a_gpu: Path) -> None:
    student, tokenizer = checkpoint.load(str(tiny_on_a_gpu))
    texts = [Text(tokenizer.encode("Once upon a time there was a dog."))] * 4
    batch = rollouts(tmp_path, student, texts).batch(0)
    assert batch.mask.sum().item() > 3
    assert mx.isfinite(student(batch.inputs)).all().item()
