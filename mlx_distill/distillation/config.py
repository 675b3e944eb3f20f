"""Everything that decides what a distillation of a language model makes."""

from dataclasses import dataclass, field

from mlx_distill.config import check_seed
from mlx_distill.data.completions import CompletionFilter
from mlx_distill.data.corpus import LAYOUTS, Reading, Sizes
from mlx_distill.data.selection import LONG
from mlx_distill.data.teacher_cache import TAILS
from mlx_distill.distillation.objective import CACHED, RESPONSE, LossTerm
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.students import DTYPES, AdapterConfig
from mlx_distill.errors import InputError
from mlx_distill.training.config import TrainingConfig


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides what a distillation makes; kept with the result.

    Args:
        teacher: Folders or hub repositories; several make an ensemble. None: text only.
        teacher_weights: Weights of several teachers.
        teacher_mean: What of several teachers is averaged: probs or logits.
        teacher_bits: Quantise the teachers to so many bits.
        use_cache: Learn from this teacher cache instead of a live teacher.
        cache_k: Tokens per position that a new cache keeps.
        cache_tail: What a new cache keeps of all other tokens: bucket, their mass, or draws, which
            take the place of half of the most probable ones.
        student: The student's folder or hub repository.
        student_config: Make the student from this config.json, with random weights.
        student_layers: Make the student from these layers of the teacher.
        tokenizer: Folder of a new student's tokenizer (default: the teacher's).
        data: JSONL file, folder with train.jsonl and valid.jsonl, or hub dataset; several are
            joined.
        valid: Held-out texts (default: valid.jsonl of a folder, else --held-out of the texts).
        held_out: Texts that are held out; of every file the same share, if they have none.
        held_out_seed: Decides which ones; it is not the training's, so that trainings compare.
        data_layout: texts for mlx-lm's layouts, completions for a teacher's stored answers.
        learn_prompts: Also learn the prompts.
        max_texts: Use the first so many texts.
        max_length: The longest text, in tokens.
        long: Longer texts are cut, dropped, or refused: cut, drop or refuse.
        pack: Join texts into rows of max_length tokens, so that nothing is padded.
        loss: Terms of the weighted sum, as forward_kl:weight=0.9,temperature=2 (default:
            forward_kl; sparse_kl of a cache; hard without a teacher).
        batch_size: Texts per batch.
        grad_checkpoint: Compute activations twice instead of keeping them.
        seed: Of first weights, order and draws.
        export_dtype: Of the exported weights: float16, bfloat16 or float32.
        export_bits: Quantise the exported student to so many bits.
        adapter: Which parameters are trained.
        rollouts: What the student writes itself.
        filter: Which stored completions are learned.
        training: Steps, learning rate and so on.
    """

    teacher: tuple[str, ...] = ()
    teacher_weights: tuple[float, ...] = ()
    teacher_mean: str = "probs"
    teacher_bits: int | None = None
    use_cache: str | None = None
    cache_k: int = 64
    cache_tail: str = "bucket"
    student: str | None = None
    student_config: str | None = None
    student_layers: tuple[int, ...] = ()
    tokenizer: str | None = None
    data: tuple[str, ...] = ()
    valid: str | None = None
    held_out: int = 64
    held_out_seed: int = 0
    data_layout: str = "texts"
    learn_prompts: bool = False
    max_texts: int | None = None
    max_length: int = 512
    long: str = "cut"
    pack: bool = False
    loss: tuple[str, ...] = ()
    batch_size: int = 8
    grad_checkpoint: bool = False
    seed: int = 0
    export_dtype: str = "float16"
    export_bits: int | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    rollouts: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    filter: CompletionFilter = field(default_factory=CompletionFilter)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if not self.loss:
            known = "sparse_kl" if self.use_cache else "forward_kl" if self.teacher else "hard"
            object.__setattr__(self, "loss", (known,))
        for name in ("batch_size", "held_out", "cache_k"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 2:
            raise InputError(f"max_length must be at least 2, got {self.max_length}")
        if self.max_texts is not None and self.max_texts < 1:
            raise InputError(f"max_texts must be at least 1, got {self.max_texts}")
        for name, known in (
            ("long", LONG),
            ("data_layout", LAYOUTS),
            ("teacher_mean", ("probs", "logits")),
            ("export_dtype", tuple(DTYPES)),
            ("cache_tail", TAILS),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)}")
        for name in ("teacher_bits", "export_bits"):
            if getattr(self, name) not in (None, 2, 3, 4, 5, 6, 8):
                raise InputError(f"{name} must be 2, 3, 4, 5, 6 or 8, got {getattr(self, name)}")
        check_seed("seed", self.seed)
        if not self.data:
            raise InputError("there is no data; name it with --data")
        ways = [bool(self.student), bool(self.student_config), bool(self.student_layers)]
        if sum(ways) > 1:
            raise InputError("student, student_config and student_layers exclude each other")
        if self.use_cache and self.rollouts.on_policy:
            raise InputError("a cache does not know what the student will write; use a teacher")
        for term in self.terms:
            if term.name != "hard" and not self.teacher and not self.use_cache:
                raise InputError(
                    f"{term.name} needs a teacher; name one with --teacher, or use --loss hard"
                )
            if self.use_cache and term.name in RESPONSE and term.name not in CACHED:
                raise InputError(
                    f"{term.name} needs all of the teacher's logits, and a cache has the top ones; "
                    "use sparse_kl"
                )

    @property
    def reading(self) -> Reading:
        """How rows become texts."""
        return Reading(
            self.data_layout,
            self.filter,
            self.learn_prompts,
            prompts=self.rollouts.on_policy > 0,
        )

    @property
    def sizes(self) -> Sizes:
        """How many texts of which length."""
        return Sizes(
            self.held_out,
            self.held_out_seed,
            self.max_texts,
            self.max_length,
            self.long,
            self.pack,
        )

    @property
    def terms(self) -> list[LossTerm]:
        """The objective."""
        return [LossTerm.parse(text) for text in self.loss]


PARTS: dict[str, type] = {
    "adapter": AdapterConfig,
    "rollouts": OnPolicyConfig,
    "filter": CompletionFilter,
    "training": TrainingConfig,
}
