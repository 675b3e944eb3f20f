"""Names for what has no type: what JSON holds, and tokenizers, which two libraries make."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

# An object of JSON; whoever reads a value checks it.
Fields: TypeAlias = dict[str, Any]
Settings: TypeAlias = Mapping[str, Any]
# mlx-lm's wrapper of a tokenizer, or one of transformers' itself.
Tokenizer: TypeAlias = Any

if TYPE_CHECKING:

    class Called:
        """What a class that is mixed in before a model's own finds behind itself."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Return what the model's own class returns."""
            ...

else:
    Called = object
