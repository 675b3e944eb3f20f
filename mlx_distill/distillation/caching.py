"""What a teacher says about texts, written to disk once."""

from collections.abc import Iterator
from pathlib import Path

from mlx_distill.data.corpus import Corpus, check_corpus, read_corpus
from mlx_distill.data.teacher_cache import CHUNK_BYTES, TeacherCache, write_cache
from mlx_distill.distillation.config import DistillConfig
from mlx_distill.distillation.memory import RANKED, Batch, reading_estimate
from mlx_distill.distillation.parts import Opening, quantize
from mlx_distill.distillation.teachers import Answers
from mlx_distill.errors import InputError
from mlx_distill.hashes import tokenizer_hash, weights_hash
from mlx_distill.target.reading import check_tokens, vocab_width


class CacheRun:
    """A teacher and the texts that it is to say something about.

    Args:
        config: Names the teacher and the texts, and says how much is kept.
        opening: How they are opened.

    Raises:
        InputError: If there is not one teacher, or something cannot be read.
    """

    def __init__(self, config: DistillConfig, opening: Opening):
        if len(config.teacher) != 1:
            raise InputError("a cache holds one teacher's answers; name it with --teacher")
        if config.rollouts.on_policy:  # questions alone, of which nothing is learned, are no texts
            raise InputError(
                "a cache holds what the teacher says about the data, not about what the student "
                "will write; leave --on-policy out"
            )
        check_corpus(config.data, config.valid)
        self.config = config
        self.template_config = opening.template_config
        self.teacher, self.tokenizer = opening.load(config.teacher[0], config.teacher_adapter_path)
        quantize(self.teacher, config.teacher_bits)
        reading = config.reading(opening.template_config)
        self.corpus: Corpus = read_corpus(
            config.data, config.valid, self.tokenizer, reading, config.sizes
        )
        read = [*self.corpus.texts, *self.corpus.valid]
        check_tokens(self.teacher, [text.tokens for text in read])
        self.answers = Answers(self.teacher, texts=True)
        # Where a model makes its logits itself, they are there for a whole batch: one text.
        self.batch_size = config.batch_size if self.answers.body else 1

    def memory(self) -> str:
        """Return the memory that the teacher takes, in words.

        Raises:
            InputError: If that is more than the machine has.
        """
        longest = max(len(text.tokens) for text in self.corpus.texts)
        logits = min(CHUNK_BYTES, 4 * longest * vocab_width(self.teacher))
        batch = Batch(self.batch_size, longest)
        return reading_estimate({"teacher": self.teacher}, batch, RANKED * logits)

    def write(self, folder: Path) -> Iterator[int]:
        """Write the cache; yield after every shard how many texts are done."""
        adapter = self.config.teacher_adapter_path
        header = {
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "weights_hash": weights_hash(self.teacher),
            "vocab_size": vocab_width(self.teacher),
            "template_config": dict(self.template_config or {}),
            "adapter": adapter and Path(adapter).name,
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield from write_cache(
            folder,
            self.answers,
            self.corpus.texts,
            header,
            self.config.cache_k,
            batch_size=self.batch_size,
            tail=self.config.cache_tail,
        )

    def bytes_per_token(self, folder: Path) -> float:
        """Return the size of a cache that was written."""
        cache = TeacherCache.open(folder, tokenizer_hash(self.tokenizer), self.corpus.texts)
        return cache.bytes_per_token
