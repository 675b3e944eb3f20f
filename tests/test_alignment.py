"""A text as another tokenizer reads it: whole, in its own template, with places that agree."""

from typing import Any

import chat_templates as templates
import mlx_lm
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_distill.checkpoint import bundled
from mlx_distill.data.alignment import read_otherwise
from mlx_distill.data.encoding import encode_row
from mlx_distill.data.selection import fit, pack
from mlx_distill.data.texts import Source, Text
from mlx_distill.errors import InputError

THEIRS = (
    "{% for m in messages %}[{{ m['role'] | upper }}] {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
)
CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "It is blue, like 🦊."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It is so."},
]


def byte_tokenizer(template: str | None = None) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|im_start|>": 0, "<|im_end|>": 1}
    vocab |= {letter: number + 2 for number, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = template
    return mlx_lm.tokenizer_utils.TokenizerWrapper(fast)


def word_tokenizer(template: str | None = None) -> Any:
    extra = {"chat_template": template} if template else {}
    return mlx_lm.utils.load_tokenizer(bundled("stories-14m"), tokenizer_config_extra=extra)


@pytest.mark.parametrize(
    ("text", "length", "read"),
    [
        ("犬は走る。", 64, "犬は走る。"),
        ("🦊 ran home.", 64, "🦊 ran home."),
        ("The fox said 犬は走る。", 18, "The fox said 犬"),
        ("🦊", 2, ""),
    ],
)
def test_no_character_is_read_in_half(text: str, length: int, read: str) -> None:
    ours, theirs = byte_tokenizer(), word_tokenizer()
    (cut,), _ = fit([encode_row({"text": text}, ours, "here")], length)
    reading = read_otherwise(cut, ours, theirs)
    whole = [*theirs.encode(read), *[theirs.eos_token_id] * (length == 64)]
    assert reading.tokens == whole


@pytest.mark.parametrize(
    "row",
    [
        {"text": "日本é日本  éЖéé 👨‍👩‍👧🦊 ran.\n👍🏽👍🏽"},
        {"prompt": "Who is 日本é?", "completion": "👨‍👩‍👧🦊éЖ ran."},
        {"prompt": "Who is 🦊é", "completion": "Ж👍🏽👍🏽 ran."},
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_characters_of_several_tokens(row: dict[str, str], swapped: bool) -> None:
    """One decoder makes nothing of any byte of a row of them if the first one is cut off."""
    ours, theirs = (byte_tokenizer(), word_tokenizer())[:: -1 if swapped else 1]
    text = encode_row(row, ours, "here")
    reading = read_otherwise(text, ours, theirs)
    assert len(reading.places) > 5
    for place, their in reading.places:
        before = (
            tokenizer.decode(tokens, skip_special_tokens=True).strip()
            for tokenizer, tokens in (
                (ours, text.tokens[:place]),
                (theirs, reading.tokens[:their]),
            )
        )
        assert next(before) == next(before)


@pytest.mark.parametrize("template", [templates.CHATML, None])
def test_chat_is_read_in_its_own_template(template: str | None) -> None:
    ours, theirs = byte_tokenizer(template), word_tokenizer(THEIRS)
    row = (
        {"messages": CHAT}
        if template
        else {"prompt": "Name a colour.", "completion": "Blue it is."}
    )
    text = encode_row(row, ours, "here")
    reading = read_otherwise(text, ours, theirs)
    asked = {"role": "user", "content": "Name a colour."}
    chat = CHAT if template else [asked, {"role": "assistant", "content": "Blue it is."}]
    assert reading.tokens == theirs.apply_chat_template(chat)
    met = dict(reading.places)
    for start, stop in text.answers():
        assert stop - 1 in met  # the end of the turn
        assert theirs.decode([reading.tokens[met[stop - 1]]]) == "</s>"
        told = [place for place in range(start, stop) if place in met]
        assert len(told) >= 3
        for place in told[:-1]:
            rest = ours.decode(text.tokens[place : stop - 1])
            their_end = reading.tokens.index(theirs.eos_token_id, met[place])
            other = theirs.decode(reading.tokens[met[place] : their_end])
            assert other.strip() == rest.strip()  # the same text follows both


def test_answer_that_a_student_wrote_is_read_out_of_its_tokens() -> None:
    ours, theirs = byte_tokenizer(templates.CHATML), word_tokenizer(THEIRS)
    asked = encode_row({"messages": CHAT[:1]}, ours, "here", prompts=True)
    written = ours.encode("It is 🦊")[:-1]  # cut off within a character
    start = len(asked.tokens)
    assert asked.source is not None
    answers = ((1, start, start + len(written)),)
    source = Source("here", asked.source.chat, True, False, answers)
    text = Text.behind([*asked.tokens, *written], start, source)
    reading = read_otherwise(text, ours, theirs)
    expected = theirs.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert theirs.decode(reading.tokens).replace(" ", "") == f"{expected}It is".replace(" ", "")
    assert {place for place, _ in reading.places} <= set(range(start, start + len(written)))


def test_learned_prompts_are_not_compared() -> None:
    ours, theirs = byte_tokenizer(templates.CHATML), word_tokenizer(THEIRS)
    some, every = (encode_row({"messages": CHAT}, ours, "here", learn) for learn in (False, True))
    assert read_otherwise(some, ours, theirs) == read_otherwise(every, ours, theirs)


def test_chat_needs_a_template_to_be_read() -> None:
    ours, theirs = byte_tokenizer(templates.CHATML), word_tokenizer()
    text = encode_row({"messages": CHAT}, ours, "f.jsonl, line 3")
    with pytest.raises(InputError, match=r"f\.jsonl, line 3: the teacher's tokenizer has no chat"):
        read_otherwise(text, ours, theirs)


def test_packed_chats_cannot_be_read_otherwise() -> None:
    ours, theirs = byte_tokenizer(templates.CHATML), word_tokenizer(THEIRS)
    (row,) = pack([encode_row({"messages": CHAT}, ours, "here")] * 2, 4096)
    with pytest.raises(InputError, match="packed chats cannot be read in another tokenizer's"):
        read_otherwise(row, ours, theirs)
    (row,) = pack([encode_row({"text": "A dog."}, ours, "here")] * 2, 4096)
    assert theirs.decode(read_otherwise(row, ours, theirs).tokens).count("A dog.") == 2
