"""A language model in two parts, cut at its hidden states: its logits are made a few at a time.

What lies behind the hidden states is often a head alone, but some models scale or cap their logits,
or compute the head themselves. Whatever it is, ``ReplayedHead`` runs the model's own code: it calls
the model once more and puts the hidden states where they belong. MLX is lazy, so what was computed
before that place costs nothing, and most models' bodies are not even entered.
"""

from operator import methodcaller

import mlx.core as mx
from jaxtyping import Float, Int
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.target.head import Head, find_head
from mlx_distill.target.reading import fresh_inputs, read_whole
from mlx_distill.target.watching import Call, Heard, hearing


class Body:
    """A language model up to its hidden states; ``head`` makes logits of those.

    Args:
        network: The model; called with token ids (B, T).
        place: Where its hidden states are.
        head: Makes logits of them; gradients reach its trainable parameters.
        num_entries: Number of logits.
    """

    def __init__(self, network: nn.Module, place: Head, head: nn.Module, num_entries: int):
        self.network = network
        self.place = place
        self.head = head
        self.num_entries = num_entries

    @classmethod
    def of(cls, network: nn.Module) -> "Body | None":
        """Return the model's body, or None if its logits depend on more than its hidden states.

        That is found out by trying, on four tokens.
        """
        tokens = mx.array([[1, 2, 3, 1]])
        logits, hidden, place, _ = find_head(network, tokens, **fresh_inputs(network))
        if place is None or hidden is None:
            return None
        width = logits.shape[-1]
        heads: list[nn.Module] = [ReplayedHead(network, place, width)]
        if place.given:
            tied = place.method == "as_linear"
            heads.insert(0, TiedHead(place.module) if tied else place.module)
        fitting = (head for head in heads if _makes(head, hidden, logits))
        head = next(fitting, None)
        return None if head is None else cls(network, place, head, width)

    def __call__(self, inputs: Int[mx.array, "B T"]) -> Float[mx.array, "B T D"]:
        """Return the hidden states."""

        def stop(call: Call, *args: object, **kwargs: object) -> object:
            hidden = args[0] if self.place.given else call(*args, **kwargs)
            assert isinstance(hidden, mx.array)
            raise _Reached(hidden)

        try:
            heard = [Heard(self.place.module, stop, self.place.method)]
            hearing(heard, read_whole, self.network, inputs)
        except _Reached as reached:
            return reached.hidden
        raise RuntimeError("the model's head was not called; was the model changed?")


class TiedHead(nn.Module):
    """An embedding that serves as the head."""

    def __init__(self, embed: nn.Module):
        super().__init__()
        self.embed = embed

    def __call__(self, hidden: Float[mx.array, "... D"]) -> Float[mx.array, "... V"]:
        """Return the logits of hidden states."""
        return methodcaller("as_linear", hidden)(self.embed)


class ReplayedHead(nn.Module):
    """What a model does with its hidden states, by its own code.

    Its parameters are those of the modules that are called there, and every matrix with a row for
    each token: some models multiply by one without calling a module.

    Args:
        network: The model.
        place: Where its hidden states are.
        num_entries: Number of its logits.
    """

    def __init__(self, network: nn.Module, place: Head, num_entries: int):
        super().__init__()
        self._network = network
        self._place = place
        called = {id(module) for module in place.behind}
        self._names = {
            f"{path}.{name}" if path else name
            for path, module in network.named_modules()
            for name, value in module.items()
            if isinstance(value, mx.array)
            and (id(module) in called or (value.ndim == 2 and value.shape[0] == num_entries))
        }

    def __call__(self, hidden: Float[mx.array, "... D"]) -> Float[mx.array, "... V"]:
        """Return the logits of hidden states."""
        place = self._place
        rows = hidden.reshape(1, -1, hidden.shape[-1])

        def skip(_: Call, *args: object, **kwargs: object) -> mx.array:
            return rows

        def give(call: Call, _: mx.array, *args: object, **kwargs: object) -> object:
            return call(rows, *args, **kwargs)

        heard = [] if place.body is None else [Heard(place.body, skip)]
        if place.given:
            heard.append(Heard(place.module, give, place.method))
        tokens = mx.zeros(rows.shape[:2], mx.int32)
        logits = hearing(heard, read_whole, self._network, tokens)
        return logits.reshape(*hidden.shape[:-1], -1)

    def trainable_parameters(self) -> dict[str, object]:
        """Return the model's trainable parameters that its logits are made with."""
        flat = dict(tree_flatten(self._network.trainable_parameters()))
        named = {name: flat[name] for name in flat if name in self._names}
        return tree_unflatten(named) if named else {}

    def update(
        self, parameters: dict[str, object] | list[object], strict: bool = True
    ) -> nn.Module:
        """Replace parameters of the model; an empty tree is a list."""
        if isinstance(parameters, dict):
            self._network.update(parameters, strict=strict)
        return self


class _Reached(Exception):
    """The forward has come to the hidden states; nothing behind them is needed."""

    def __init__(self, hidden: mx.array):
        self.hidden = hidden


def _makes(head: nn.Module, hidden: mx.array, logits: mx.array) -> bool:
    """Return whether a head makes exactly these logits of hidden states."""
    try:
        found = head(hidden)
    except (ValueError, TypeError, IndexError, AttributeError):
        return False
    return found.shape == logits.shape and bool(mx.array_equal(found, logits).item())
