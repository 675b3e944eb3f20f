"""All that a training reads: the texts to learn, those held out, and what became of every row."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.data.completions import CompletionFilter, completion_texts, read_completions
from mlx_distill.data.encoding import read_texts
from mlx_distill.data.report import LOST, Report
from mlx_distill.data.selection import fit, limited, pack, split_held_out
from mlx_distill.data.sources import SUFFIXES, check_sources, local_file
from mlx_distill.data.texts import Text
from mlx_distill.files import usable_path

LAYOUTS = ("texts", "completions")


@dataclass(frozen=True)
class Reading:
    """How rows become texts.

    Args:
        layout: "texts" are rows of mlx-lm's kind, every one of which must be usable; "completions"
            are stored answers of any service, filtered.
        filter: Which completions are kept.
        learn_prompts: Also learn the prompts, not the answers alone.
        template_config: Further arguments of the chat template.
        prompts: Take questions without an answer, too, for a student that writes its own.
    """

    layout: str = "texts"
    filter: CompletionFilter = field(default_factory=CompletionFilter)
    learn_prompts: bool = False
    template_config: Mapping[str, Any] | None = None
    prompts: bool = False

    def texts(
        self, source: str | Path, tokenizer: Any, report: Report, split: str = "train"
    ) -> list[Text]:
        """Return the texts of a source, in its order; the report counts its rows.

        Raises:
            InputError: If it cannot be read, or holds none.
        """
        if self.layout == "texts":
            return read_texts(
                source,
                tokenizer,
                learn_prompts=self.learn_prompts,
                split=split,
                template_config=self.template_config,
                prompts=self.prompts,
                report=report,
            )
        completions, found = read_completions(local_file(source, split), self.filter)
        report.add(found)
        return completion_texts(
            completions,
            tokenizer,
            self.learn_prompts,
            template_config=self.template_config,
            report=report,
        )


@dataclass(frozen=True)
class Sizes:
    """How many texts of which length.

    Args:
        held_out: Texts to judge with: of every file the same share, or the first ones of a file of
            their own.
        held_out_seed: Decides which ones; another seed's training is judged with the same.
        max_texts: Texts to learn at most; None for all.
        max_length: Tokens of a text at most.
        long: What happens to longer ones, as of ``fit``.
        pack: Put texts end to end, in rows of ``max_length``.
    """

    held_out: int = 64
    held_out_seed: int = 0
    max_texts: int | None = None
    max_length: int = 512
    long: str = "cut"
    pack: bool = False


@dataclass(frozen=True)
class Corpus:
    """What was read.

    Args:
        texts: To learn.
        valid: Held out.
        report: What became of the rows to learn.
        valid_report: And of those held out.
    """

    texts: list[Text]
    valid: list[Text]
    report: Report
    valid_report: Report

    def lines(self) -> list[str]:
        """Return what became of all rows, as text."""
        return [*self.report.lines(), *self.valid_report.lines()]

    def to_dict(self) -> dict[str, Any]:
        """Return what became of all rows, for a JSON file."""
        return {**self.report.to_dict(), "held_out": self.valid_report.to_dict()}


def check_corpus(data: Sequence[str], valid: str | None) -> None:
    """Raise InputError if a source is not there; to be called before models are loaded."""
    check_sources(data)
    check_sources([source for source, split in _valid(data, valid)], "valid")


def read_corpus(
    data: Sequence[str],
    valid: str | None,
    tokenizer: Any,
    reading: Reading,
    sizes: Sizes,
) -> Corpus:
    """Return the texts of some sources, those held out, and what became of every row.

    Args:
        data: Sources to learn from.
        valid: The source to judge with. None takes ``valid.jsonl`` of the first source if that is
            a folder with such a file, and else some of the texts to learn.
        tokenizer: An mlx-lm tokenizer.
        reading: How rows become texts.
        sizes: How many, and how long.

    Raises:
        InputError: If a source cannot be read, or nothing is left of one of the two.
    """
    report, held = Report(), Report(noun="held-out texts")
    texts = [text for source in data for text in reading.texts(source, tokenizer, report)]
    sources = _valid(data, valid)
    if sources:
        found = Report()
        kept = [t for one, split in sources for t in reading.texts(one, tokenizer, found, split)]
        held.add(found)
        kept = limited(kept, sizes.held_out, held)
    else:
        texts, kept = split_held_out(texts, sizes.held_out, sizes.held_out_seed)
        learned, judged = _rows(texts), _rows(kept)
        held.rows = len(judged)
        report.rows -= len(judged - learned)
        for text in kept:
            if text.source and text.source.lost:
                report.unchange(LOST, text.place)
                held.change(LOST, text.place)
    texts = limited(texts, sizes.max_texts, report)
    keeps = {"prompts": reading.prompts}
    split = sizes.pack and sizes.long == "cut"  # packing loses nothing of a long text
    longest = max((len(text.tokens) for text in texts), default=1) if split else sizes.max_length
    texts, report = fit(texts, longest, sizes.long, report=report, **keeps)
    kept, held = fit(kept, sizes.max_length, sizes.long, report=held, **keeps)
    return Corpus(pack(texts, sizes.max_length) if sizes.pack else texts, kept, report, held)


def _rows(texts: Sequence[Text]) -> set[Hashable]:
    """Return what tells the rows of texts apart; those of several choices are one row's."""
    return {
        text.source.row if text.source and text.source.row != text.place else id(text)
        for text in texts
    }


def _valid(data: Sequence[str], valid: str | None) -> list[tuple[str, str]]:
    """Return the source of its own that the held-out texts have, with its split; or nothing."""
    if valid:
        return [(valid, "valid")]
    first = usable_path(data[0], "the data")
    if first.is_dir() and any((first / f"valid{suffix}").exists() for suffix in SUFFIXES):
        return [(data[0], "valid")]
    return []
