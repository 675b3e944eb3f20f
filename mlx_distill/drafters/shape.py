"""What the shapes of trained drafters have in common: a checkpoint's configuration holds them."""

import dataclasses
from typing import Annotated, Any, ClassVar, TypeVar

from mlx_distill.errors import InputError
from mlx_distill.limits import Between
from mlx_distill.untyped import Fields

# Of drafters that none was fitted for. The target's best token is likelier to be the drafter's than
# the drafter's distribution says. The bundled pair takes 3.07 tokens per call at temperature 0 and
# 2.52 at 1 with a factor of 1.0, 3.22 and 2.53 with 1.4, 3.18 and 2.46 with 2.5 (12 prompts of the
# split that the README's results are measured on, default draft).
SHARPNESS = 1.4
Size = Annotated[int, Between(1, 2**31 - 1)]
Tap = Annotated[int, Between(-10_000, 10_000)]
Sharpness = Annotated[float, Between(above=0, high=100)]

S = TypeVar("S", bound="DrafterShape")


class DrafterShape:
    """The base of the frozen dataclasses that say how large a drafter is.

    Attributes:
        model_type: Names the kind in ``config.json``.
        fitted: Fields that are fitted when a training ends.
    """

    model_type: ClassVar[str]
    fitted: ClassVar[tuple[str, ...]] = ("sharpness",)

    @property
    def unfitted(self: S) -> S:
        """The same shape before anything was fitted."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.replace(self, **{x: getattr(type(self), x) for x in self.fitted})

    @classmethod
    def from_dict(cls: type[S], values: Fields) -> S:
        """Return the configuration of a checkpoint's ``config.json``.

        Raises:
            InputError: If a field is missing, or unknown.
        """
        assert dataclasses.is_dataclass(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise InputError(f"the drafter's config has unknown fields: {', '.join(unknown)}")
        required = [f.name for f in fields.values() if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise InputError(f"the drafter's config lacks the fields: {', '.join(missing)}")
        return cls(**{name: _without_lists(value) for name, value in values.items()})


def check_draft_vocab(draft_vocab_size: int | None, vocab_size: int) -> None:
    """Raise InputError if more tokens are to be drafted than there are."""
    if (draft_vocab_size or 1) > vocab_size:
        raise InputError(
            f"draft_vocab_size must be at most the vocabulary's {vocab_size}, "
            f"got {draft_vocab_size}"
        )


def _without_lists(value: Any) -> Any:
    """Return a value of JSON, which knows no tuples."""
    return tuple(map(_without_lists, value)) if isinstance(value, list) else value
