"""How many operations a GPU would be sent for a computation, counted on any machine.

Every operation that a GPU is sent costs some microseconds, however little it does. MLX's graph says
which there are before any runs, so nothing is timed and no GPU is needed:

    with as_sent_to_a_gpu() as sent:
        sent.add(model(tokens, cache=caches))      # built, not computed
    sent.count()                                   # {"Matmul": 57, "fast": 33, ...}

What counts follows the sources of MLX 0.32 (``mlx/backend/gpu``, ``mlx/backend/metal``):

* views and constants are nothing; a compiled region, a ``mx.fast`` call and a kernel are one each;
* joined arrays are one copy each, padding is two, and so is a slice whose place the device knows;
* writing into an array is one, and one more where somebody else reads the array as it was;
* a reshape is a copy where its input does not lie in memory that way, and some ``mx.fast`` kernels
  first copy what does not lie as they need it. How an array lies is the same on every device, so
  once the graph is counted, it is computed here and looked at.

Left out: sorts take several passes over a long axis and reductions two over millions of values;
both count once. Where attention has no kernel for a head's width, MLX takes its steps one by one;
here it counts once.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.arrays import in_memory
from mlx_distill.benchmarking.kernel_regions import Node, within_kernels

VIEWS = frozenset(
    (
        *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends"),
        *("ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Slice", "Split", "Squeeze"),
        *("StopGradient", "Transpose", "Unflatten", "View"),
    )
)
SEVERAL = {"Pad": 2, "DynamicSlice": 2, "DynamicSliceUpdate": 2}
WRITES = frozenset(("SliceUpdate", "DynamicSliceUpdate", "Scatter", "ScatterAxis", "MaskedScatter"))
# Up to so many queries, Metal's attention writes its output head by head; beyond, token by token.
FEW_QUERIES = 8

Lies = Callable[[np.ndarray], bool]


class Sent:
    """What a GPU would be sent.

    Attributes:
        arrays: What is to be computed.
    """

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self._copied: list[Callable[[], bool]] = []  # asked when everything is computed

    def add(self, *tree: object) -> None:
        """Add arrays, however nested, to what is to be computed."""
        self.arrays += [leaf for _, leaf in tree_flatten(list(tree)) if isinstance(leaf, mx.array)]

    def count(self) -> Counter[str]:
        """Return the number of dispatches by kind; this computes the arrays."""
        found = in_graph(self.arrays)
        mx.eval(self.arrays)
        copies = sum(_holds(copied) for copied in self._copied)
        return found + Counter({"copies": copies})

    def needs(self, x: mx.array, lies: Lies) -> None:
        """Note that a kernel copies an array first unless it lies in memory as it needs it."""
        self._copied.append(lambda: not lies(in_memory(x)))

    def reshaped(self, x: mx.array, shaped: mx.array) -> mx.array:
        """Note that an array was reshaped, which may have copied it; return the result."""
        self._copied.append(lambda: not np.shares_memory(in_memory(x), in_memory(shaped)))
        return shaped


@contextmanager
def as_sent_to_a_gpu() -> Iterator[Sent]:
    """Let graphs be built as on a GPU, within; what is launched is noted and not computed.

    Names of ``mx`` are replaced meanwhile, for all threads of the process.
    """
    sent = Sent()
    gpu = mx.Device(mx.gpu)
    with ExitStack() as names:
        for owner, name, value in (
            (mx, "default_device", lambda: gpu),
            (mx, "async_eval", sent.add),
            (mx, "eval", sent.add),
            *_stand_ins(sent),
            *_reshapes(sent),
        ):
            names.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield sent


def in_graph(arrays: Iterable[mx.array]) -> Counter[str]:
    """Return the number of dispatches that arrays need by kind, as far as their graph tells."""
    nodes = _nodes(arrays)
    sources = {output: node for node in nodes for output in node.outputs}
    readers = Counter(
        owner for node in nodes for owner in {_owner(name, sources) for name in node.inputs}
    )
    found: Counter[str] = Counter()
    within = within_kernels(nodes)
    for node in nodes:
        if node.primitive in VIEWS or node in within:
            continue
        joined = node.primitive == "Concatenate"
        found[node.kind] += len(node.inputs) if joined else SEVERAL.get(node.primitive, 1)
        if node.primitive in WRITES and readers[_owner(node.inputs[0], sources)] > 1:
            found["copies"] += 1
    return found


def _owner(name: str, sources: dict[str, Node]) -> str:
    """Return the array whose memory an array is in."""
    while name in sources and sources[name].primitive in VIEWS:
        name = sources[name].inputs[0]
    return name


def _nodes(arrays: Iterable[mx.array]) -> set[Node]:
    """Return the operations that arrays need.

    Calls of one compiled function share a number in the graph, so their arrays tell them apart.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "graph.dot")
        mx.export_to_dot(path, *arrays)
        with open(path, encoding="utf-8") as file:
            blocks = re.split(r'^{ \d+ \[label ="', file.read(), flags=re.MULTILINE)[1:]
    return {
        Node(
            block[: block.index('"')].split()[0],  # of "View int32" the first word
            tuple(re.findall(r'^"(\w+)" -> ', block, re.MULTILINE)),
            tuple(re.findall(r' -> "(\w+)"$', block, re.MULTILINE)),
        )
        for block in blocks
    }


# ------------------------------------------------------------------------------- what stands in


def _one(shape: tuple[int, ...], dtype: mx.Dtype, *inputs: object) -> mx.array:
    """Return an array in row order that takes one operation and needs the inputs."""
    needed = [x for x in inputs if isinstance(x, mx.array)]
    (zeros,) = mx.depends([mx.broadcast_to(mx.array(0, dtype), shape)], needed)
    return mx.logcumsumexp(zeros, axis=-1)


def _stand_ins(sent: Sent) -> list[tuple[object, str, Callable[..., mx.array]]]:
    """Return what stands for the functions of ``mx.fast``, which off a GPU are many operations."""

    def norm(x: mx.array, weight: mx.array | None, *rest: object, **_: object) -> mx.array:
        sent.needs(x, _rows_together)
        dtype = x.dtype if weight is None else mx.result_type(x, weight)
        return _one(x.shape, dtype, x, weight, *rest)

    def rope(x: mx.array, dims: int, **options: object) -> mx.array:
        sent.needs(x, _tokens_or_heads_together if dims == x.shape[-1] else _never)
        return _one(x.shape, x.dtype, x, *options.values())

    def attention(q: mx.array, k: mx.array, v: mx.array, **options: object) -> mx.array:
        batch, heads, queries, _ = q.shape
        few = queries <= FEW_QUERIES
        sent.needs(q, _queries_together if few else _values_together)
        for x in (k, v):
            sent.needs(x, _values_together)
        shape = (batch, heads, queries) if few else (batch, queries, heads)
        output = _one((*shape, v.shape[-1]), q.dtype, q, k, v, *options.values())
        return output if few else output.transpose(0, 2, 1, 3)

    stand_ins = {
        "rms_norm": norm,
        "layer_norm": norm,
        "rope": rope,
        "scaled_dot_product_attention": attention,
    }
    return [(mx.fast, name, stand_in) for name, stand_in in stand_ins.items()]


def _reshapes(sent: Sent) -> list[tuple[object, str, Callable[..., mx.array]]]:
    """Return reshapes that are noted."""

    def noting(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def reshape(x: mx.array, *args: object, **options: object) -> mx.array:
            return sent.reshaped(x, call(x, *args, **options))

        return reshape

    return [
        (owner, name, noting(getattr(owner, name)))
        for owner in (mx, mx.array)
        for name in ("reshape", "flatten")
    ]


# ------------------------------------------------------------------------------ how arrays lie


def _holds(copied: Callable[[], bool]) -> bool:
    try:
        return copied()
    except (ValueError, RuntimeError):  # a stand-in for an array, of a function being compiled
        return False


def _strides(x: np.ndarray) -> list[int]:
    return [stride // x.itemsize for stride in x.strides]


def _never(x: np.ndarray) -> bool:
    return False


def _values_together(x: np.ndarray) -> bool:
    return _strides(x)[-1] == 1


def _rows_together(x: np.ndarray) -> bool:
    """Return whether a norm takes its rows as they lie."""
    *_, between, within = [x.shape[-1], *_strides(x)]
    return within == 1 and (between in (0, x.shape[-1]) or x.ndim == 1 or x.shape[-2] == 1)


def _tokens_or_heads_together(x: np.ndarray) -> bool:
    """Return whether ``rope`` takes its input: head by head, token by token, or one sequence."""
    if x.flags.c_contiguous or x.ndim == 3:
        return True
    if x.ndim != 4:
        return False
    _, heads, tokens, width = x.shape
    turned = [tokens * heads * width, width, heads * width, 1]
    return (
        x.shape[0] == 1 == heads
        or (x.shape[0] == 1 and _strides(x)[1:] == turned[1:])
        or (_strides(x) == turned)
    )


def _queries_together(x: np.ndarray) -> bool:
    """Return whether attention takes a few queries: head by head or token by token."""
    batch, heads, _, width = x.shape
    one = 1 if batch == 1 else 0
    turned = _strides(x)[2:] == [x.shape[one] * width, 1] and _strides(x)[one] == width
    return x.flags.c_contiguous or (1 in (batch, heads) and turned)
