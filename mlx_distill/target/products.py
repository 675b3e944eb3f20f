"""The products of a model's weights with a few rows, taken over during a call.

Every module that multiplies rows by a matrix, a linear layer or an embedding that serves as the
head, is stood around: its rows are multiplied by what was chosen for so few of them (``kernels``),
or, where rows are to be exact, in a way that gives a row the same bits whatever goes with it. The
modules, their classes and all other calls stay as they are.
"""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
from jaxtyping import Float
from mlx import nn

from mlx_distill.kernels.product_source import MOST_ROWS, Matrix, Packed
from mlx_distill.kernels.products import few_rows, few_rows_chosen, one_by_one
from mlx_distill.target.watching import Call, Heard

_METHODS = {
    nn.Linear: "__call__",
    nn.QuantizedLinear: "__call__",
    nn.Embedding: "as_linear",
    nn.QuantizedEmbedding: "as_linear",
}


class Products:
    """What multiplies by a model's matrices.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self.places = [
            (module, method)
            for module in {id(part): part for part in model.modules()}.values()
            if (method := _method(module)) is not None
        ]
        self._heard = {exact: self._all(exact) for exact in (False, True)}

    def of_few_rows(self, exact: bool) -> Sequence[Heard]:
        """Return what has to be heard so that few rows are multiplied in the chosen way.

        Args:
            exact: Whether a row's product must not depend on how many rows there are.
        """
        return self._heard[exact]

    def _all(self, exact: bool) -> Sequence[Heard]:
        return [
            Heard(module, partial(_product, module, exact), method)
            for module, method in self.places
        ]


def _method(module: nn.Module) -> str | None:
    """Return which method of a module multiplies by its matrix, by the code that is known here."""
    kind = type(module)
    kind = getattr(kind, "watched_class", kind)
    for known, method in _METHODS.items():
        if isinstance(module, known) and getattr(kind, method) is getattr(known, method):
            return method
    return None


def _product(
    module: nn.Module, exact: bool, call: Call, x: Float[mx.array, "... K"]
) -> Float[mx.array, "... O"]:
    """Return a module's product with rows: of few in the chosen way, of others by its own code."""
    count = x.size // x.shape[-1]
    if few_rows_chosen() and count <= MOST_ROWS and (exact or count > 1):
        multiply = few_rows
    elif exact and count > 1:
        multiply = one_by_one
    else:
        return call(x)
    rows = x.reshape(count, x.shape[-1])
    product = multiply(rows, module["weight"], module.get("bias"), _packed(module))
    return product.reshape(*x.shape[:-1], -1)


def matrix_of(module: nn.Module) -> Matrix | None:
    """Return what a linear layer multiplies by; None where it is not known to do just that."""
    if _method(module) != "__call__":
        return None
    return Matrix(module["weight"], module.get("bias"), _packed(module))


def _packed(module: nn.Module) -> Packed | None:
    """Return how a module's weights are packed, if they are."""
    if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return None
    size, bits, mode = module.group_size, module.bits, module.mode
    return Packed(module["scales"], module.get("biases"), size, bits, mode)
