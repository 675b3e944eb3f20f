"""Everything that decides what a distillation of a language model makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from mlx_distill.data.completions import CompletionFilter
from mlx_distill.data.corpus import LAYOUTS, Reading, Sizes
from mlx_distill.data.selection import LONG
from mlx_distill.data.teacher_cache import TAILS
from mlx_distill.distillation.adapters import AdapterConfig
from mlx_distill.distillation.exporting import BITS, ExportConfig
from mlx_distill.distillation.on_policy import OnPolicyConfig
from mlx_distill.distillation.teachers import TeacherMean, TeacherWeights
from mlx_distill.distillation.terms import CACHED, RESPONSE, LossTerm
from mlx_distill.errors import InputError
from mlx_distill.limits import Between, Count, OneOf, Seed, check_fields
from mlx_distill.training.config import ADAPTERS, LAYERS, NEW, PRETRAINED, TrainingConfig


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides what a distillation makes; kept with the result.

    Args:
        teacher: Folders or hub repositories; several make an ensemble. None: text only.
        teacher_weights: Weights of several teachers. Without them, equal ones.
        teacher_mean: What of several teachers is averaged.
        teacher_bits: Quantise the teachers to so many bits. Without it, they stay as they are.
        use_cache: Learn from this teacher cache instead of a live teacher.
        cache_k: Tokens per position that a new cache keeps.
        cache_tail: What a new cache keeps of all other tokens: bucket, their mass, or draws, which
            take the place of half of the most probable ones.
        student: The student's folder or hub repository.
        student_config: Make the student from this config.json, with random weights.
        student_layers: Make the student from these layers of the teacher, numbers from 0 on.
        tokenizer: Folder of a new student's tokenizer (default: the teacher's).
        data: JSONL file, folder with train.jsonl and valid.jsonl, or hub dataset; several are
            joined.
        valid: Held-out texts (default: valid.jsonl of a folder, else --held-out of the texts).
        held_out: Texts that are held out; of every file the same share, if they have none.
        held_out_seed: Decides which ones; it is not the training's, so that trainings compare.
        data_layout: texts for mlx-lm's layouts, completions for a teacher's stored answers.
        learn_prompts: Also learn the prompts.
        max_texts: Use the first so many texts. Without it, all.
        max_length: The longest text, in tokens.
        long: Longer texts are cut, dropped, or refused.
        pack: Join texts into rows of max_length tokens, so that nothing is padded.
        loss: Terms of the weighted sum, as forward_kl:weight=0.9,temperature=2 (default:
            forward_kl; sparse_kl of a cache; hard without a teacher).
        batch_size: Texts per batch.
        grad_checkpoint: Compute activations twice instead of keeping them.
        seed: Of first weights, order and draws.
        teacher_adapter_path: Folder of adapters that mlx-lm trained for the (first) teacher; they
            are merged where the student is made of its layers.
        adapter_path: The same of the student; they are merged before it learns, which loses some
            of them where it is quantised, unless --export-dequantized is given.
        adapter: Which parameters are trained.
        rollouts: What the student writes itself.
        filter: Which stored completions are learned.
        training: Steps, learning rate and so on.
        export: How the student is written.
    """

    teacher: tuple[str, ...] = ()
    teacher_weights: TeacherWeights = ()
    teacher_mean: TeacherMean = "probs"
    teacher_bits: Annotated[int | None, OneOf(*BITS)] = None
    use_cache: str | None = None
    cache_k: Count = 64
    cache_tail: Annotated[str, OneOf(*TAILS)] = "bucket"
    student: str | None = None
    student_config: str | None = None
    student_layers: tuple[Annotated[int, Between(0, 10_000)], ...] = ()
    tokenizer: str | None = None
    data: tuple[str, ...] = ()
    valid: str | None = None
    held_out: Count = 64
    held_out_seed: Seed = 0
    data_layout: Annotated[str, OneOf(*LAYOUTS)] = "texts"
    learn_prompts: bool = False
    max_texts: Annotated[int | None, Between(1, 10**9)] = None
    max_length: Annotated[int, Between(2, 10**9)] = 512
    long: Annotated[str, OneOf(*LONG)] = "cut"
    pack: bool = False
    loss: tuple[str, ...] = ()
    batch_size: Count = 8
    grad_checkpoint: bool = False
    seed: Seed = 0
    teacher_adapter_path: str | None = None
    adapter_path: str | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    rollouts: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    filter: CompletionFilter = field(default_factory=CompletionFilter)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        if not self.loss:
            known = "sparse_kl" if self.use_cache else "forward_kl" if self.teacher else "hard"
            object.__setattr__(self, "loss", (known,))
        check_fields(self)
        object.__setattr__(self, "training", self.training.resolved(self.trained))
        if not self.data:
            raise InputError("there is no data; name it with --data")
        ways = [bool(self.student), bool(self.student_config), bool(self.student_layers)]
        if sum(ways) > 1:
            raise InputError("student, student_config and student_layers exclude each other")
        if self.teacher_weights and len(self.teacher_weights) != len(self.teacher):
            raise InputError(
                f"{len(self.teacher_weights)} weights do not fit {len(self.teacher)} teachers"
            )
        if self.adapter_path and not self.student:
            raise InputError("adapter_path is of a student; name it with --student")
        if self.teacher_adapter_path and len(self.teacher) != 1:
            raise InputError("teacher_adapter_path is of one teacher; name it with --teacher")
        if self.export.keep_adapters and self.adapter.fine_tune == "full":
            raise InputError("keep_adapters needs some; use --fine-tune lora")
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

    def reading(self, template_config: Mapping[str, Any] | None = None) -> Reading:
        """Return how rows become texts; the chat template's further arguments are the command's."""
        return Reading(
            self.data_layout,
            self.filter,
            self.learn_prompts,
            template_config,
            prompts=self.rollouts.on_policy > 0,
        )

    @property
    def trained(self) -> str:
        """What is trained, by which the learning rate is chosen where none is given."""
        if self.adapter.fine_tune != "full":
            return ADAPTERS
        if self.student_layers:
            return LAYERS
        return NEW if self.student_config else PRETRAINED

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
    "export": ExportConfig,
}
