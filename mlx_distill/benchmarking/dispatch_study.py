"""Dispatches of mlx-lm's plain step, and of every part of a cycle of drafting.

A step and a call of the target are counted from their graphs, in which ``mx.fast`` calls are one
operation each. The draft and the rest of a cycle are counted in a text that is
really written, each operation when it is sent, and averaged over the cycles: what is paid for only
now and then, noise and commits of branches, is in them with its share. A ``mx.fast`` call in them,
as of a drafter's context blocks, is computed on its own and counted as one operation, too; within
what is compiled it is marked as one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from mlx_distill.benchmarking.arms import endless
from mlx_distill.benchmarking.dispatches import as_sent_to_a_gpu, in_graph
from mlx_distill.benchmarking.kernel_regions import marked_as, standing_in
from mlx_distill.compat import model_classes
from mlx_distill.core.prefix_tree import PrefixTree
from mlx_distill.drafters.bound import BoundDrafter, settle
from mlx_distill.drafters.compiling import CompiledDrafts
from mlx_distill.drafters.protocol import Drafter, DraftPlan
from mlx_distill.kernels.choice import forced, performing
from mlx_distill.speculation.caching import PromptCache
from mlx_distill.speculation.generation import stream_generate
from mlx_distill.speculation.phases import Made, arrays_in, watching
from mlx_distill.target.context import position_limit
from mlx_distill.target.layer_cache import arrays_of
from mlx_distill.target.layers import numbered_layers
from mlx_distill.target.target import Target

evaluate = mx.eval  # also while the name means to note what is launched

NODES = (2, 4, 8, 16)
LAWS = {"greedy": 0.0, "sampled": 1.0}
# Off a GPU these are many operations each.
FAST = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
CONTEXT = 128
TEXT_TOKENS = 100  # of the text whose cycles are counted
# The shapes of Llama-3.2-1B, Qwen3-0.6B and Gemma-3-1B, but for their widths, which cost no
# dispatches. The second figure is after how many layers the kinds of layers repeat.
_WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "head_dim": 64}
_SHARED = {**_WIDTHS, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({"num_hidden_layers": 16, "rope_theta": 500000.0}, 1),
    "qwen3": (
        {
            "num_hidden_layers": 28,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
        1,
    ),
    "gemma3_text": (
        {
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
        },
        6,
    ),
}


def shape(kind: str, num_layers: int | None = None) -> nn.Module:
    """Return a narrow model with random weights and the layers of a real one."""
    config = {"model_type": kind, **_SHARED, **SHAPES[kind][0]}
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    return model


def study(
    model: nn.Module,
    tokenizer: Any,
    drafter: Drafter,
    prompt: Sequence[int],
    plan: DraftPlan,
    others: bool,
) -> dict[str, Any]:
    """Return the dispatches of a pair, and those of models of other architectures.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        drafter: Drafts.
        prompt: What the pair continues.
        plan: The shape of the drafts.
        others: Whether to count the other models.
    """
    name, layers = getattr(model, "model_type", type(model).__name__), len(numbered_layers(model))
    cycles = {
        law: of_cycle(model, tokenizer, drafter, prompt, plan, temperature)
        for law, temperature in LAWS.items()
    }
    pair = {"model": f"the pair, {name}", "layers": layers, **of_target(model)}
    found = {"targets": [pair, *(shapes() if others else ())], "cycles": cycles}
    with forced(), performing(standing_in):
        law = {law: of_cycle(model, tokenizer, drafter, prompt, plan, t) for law, t in LAWS.items()}
    call = of_tree_call_by_kernels(model, plan.nodes)
    return {**found, "with_kernels": {"target_call": call, "cycles": law}}


def shapes() -> list[dict[str, Any]]:
    """Return the dispatches of every shape, whole and per layer."""
    found = []
    for kind, (config, period) in tqdm(SHAPES.items(), desc="models", leave=False):
        layers = config["num_hidden_layers"]
        whole, fewer = (of_target(shape(kind, num)) for num in (layers, layers - period))
        per_layer = (whole["plain_step"] - fewer["plain_step"]) / period
        found.append({"model": kind, "layers": layers, **whole, "plain_per_layer": per_layer})
    return found


def of_target(model: nn.Module) -> dict[str, Any]:
    """Return the dispatches of a plain step, of calls on trees, and of a commit that moves nodes.

    Beside them stand mlx-lm's own calls on as many consecutive tokens, as of a prompt: what several
    rows cost in its models in any case.
    """
    found = {"plain_step": _sent(model, _stepping(model))}
    for nodes in NODES:
        found[f"target_call_{nodes}"] = _sent(model, _verifying(model, nodes))
        found[f"mlx_lm_rows_{nodes}"] = _sent(model, _reading(model, nodes))
    found["moving_commit"] = _sent(model, _committing(model))
    kinds = {name: dict(found[name]) for name in ("plain_step", "target_call_8")}
    counts = {name: kind.total() for name, kind in found.items()}
    return {**counts, "kernels_8": of_tree_call_by_kernels(model, 8), "kinds": kinds}


def of_plain_step(model: nn.Module) -> int:
    """Return the dispatches of mlx-lm's plain step."""
    return _sent(model, _stepping(model)).total()


def of_tree_call(model: nn.Module, nodes: int) -> int:
    """Return the dispatches of a call on a tree of so many nodes."""
    return _sent(model, _verifying(model, nodes)).total()


def of_tree_call_by_kernels(model: nn.Module, nodes: int) -> int:
    """Return the same with all kernels."""
    with forced(), performing(standing_in):
        return of_tree_call(model, nodes)


Build = Callable[[PromptCache], object]


def _sent(model: nn.Module, build: Build) -> Counter[str]:
    """Return the dispatches of what is built on a cache that holds a text."""
    target, caches = Target.of(model), make_prompt_cache(model)
    target.forward(mx.full((_context(model),), 7), caches)
    build(caches)  # compiles what is compiled; the caches must have room for trees, too
    evaluate(arrays_of(caches))
    with as_sent_to_a_gpu() as sent:
        sent.add(build(caches), arrays_of(caches))
    return sent.count()


def _context(model: nn.Module) -> int:
    """Return how long the text is: behind a table of positions lies foreign memory."""
    limit = position_limit(model)
    # Up to so many tokens are read behind it, twice.
    return CONTEXT if limit is None else max(1, min(CONTEXT, limit - 2 * max(NODES)))


def _stepping(model: nn.Module) -> Build:
    def build(caches: PromptCache) -> None:
        # It launches the step, and then is told that it was the last.
        list(generate_step(mx.array([5]), model, max_tokens=0, prompt_cache=caches))

    return build


def _reading(model: nn.Module, num_tokens: int) -> Build:
    return lambda caches: model(mx.array([[5] * num_tokens]), cache=caches)


def _verifying(model: nn.Module, nodes: int) -> Build:
    tree = _tree(nodes)

    def build(caches: PromptCache) -> tuple[mx.array, mx.array]:
        call = Target.of(model).verify(tree, caches)
        call.rewind(0)
        return call.logits, call.hidden

    return build


def _committing(model: nn.Module) -> Build:
    """Return the building of a commit of a branch that lies apart."""
    tree = _tree(8)

    def build(caches: PromptCache) -> None:
        call = Target.of(model).verify(tree, caches)
        evaluate(arrays_of(caches))
        call.commit([0, 2, 5])

    return build


def _tree(nodes: int) -> PrefixTree:
    """Return a binary tree."""
    parents = [0, *((node - 1) // 2 for node in range(1, nodes))]
    tree = PrefixTree.from_parents(mx.array([5] * nodes), mx.array(parents), nodes.bit_length() - 1)
    evaluate(tree.tokens, tree.parents, tree.mask, tree.depths)
    return tree


# --------------------------------------------------------------------- the draft and the rest


class CycleCounter:
    """Counts what is sent while a text is written, by part of the cycle.

    Attributes:
        found: Dispatches by part, but for the target's; what lies between the parts is the host's.
        cycles: Calls of the target.
        drafts: Drafts; the last one of a text is not verified any more.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.cycles = self.drafts = 0
        self._part: str | None = None

    def reset(self) -> None:
        """Start again."""
        self.found.clear()
        self.cycles = self.drafts = 0

    def note(self, part: str, *things: object) -> None:
        """Count what arrays need, and compute them."""
        arrays = arrays_in(things)
        if arrays:
            self.found[part] += in_graph(arrays).total()
            evaluate(arrays)

    @contextmanager
    def phase(self, name: str, needs: tuple[object, ...]) -> Iterator[Made]:
        """Count a part; a call of the target has operations that only a GPU knows."""
        made: list[object] = []
        self.note("host", needs)
        self._part = None if name == "target" else name
        try:
            yield lambda *things: made.extend(things)
        finally:
            self._part = None
        if name == "target":
            self.cycles += 1
            evaluate(arrays_in(made))
        else:
            self.drafts += name == "draft"
            self.note(name, made)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what is sent meanwhile; it is sent when it is counted, and not before."""
        with ExitStack() as names:
            names.callback(setattr, mx, "async_eval", mx.async_eval)
            mx.async_eval = lambda *tree: None
            if mx.default_device() == mx.Device(mx.cpu):
                for name in FAST:
                    call = getattr(mx.fast, name)
                    names.callback(setattr, mx.fast, name, call)
                    setattr(mx.fast, name, partial(self._once, call))
            with watching(self):
                yield

    def _once(self, call: Callable[..., mx.array], *args: Any, **options: Any) -> mx.array:
        """Count a ``mx.fast`` call as the one operation that it is on a GPU; compute it."""
        part = self._part
        if part is None:
            return call(*args, **options)
        needs = arrays_in([args, list(options.values())])
        sent = in_graph(needs).total()
        try:
            evaluate(needs)
        except ValueError:  # a function is being compiled, and what it computes is counted then
            return marked_as(1, call, *args, **options)
        output = call(*args, **options)
        evaluate(output)
        self.found[part] += sent + 1
        return output


def of_cycle(
    model: nn.Module,
    tokenizer: Any,
    drafter: Drafter,
    prompt: Sequence[int],
    plan: DraftPlan,
    temperature: float,
) -> dict[str, float]:
    """Return the dispatches of a draft, of commits and of the rest of a cycle, on the average."""
    drafter = as_a_gpu_has_it(drafter)
    steps = stream_generate(
        model,
        endless(tokenizer),
        prompt,
        drafter=drafter,
        plan=plan,
        temperature=temperature,
        seed=0,
        max_tokens=TEXT_TOKENS,
    )
    _forget_compiled(drafter)  # what is compiled is looked at when it is compiled
    found = by_phase(steps)
    _forget_compiled(drafter)  # it is marked now
    rest = found["tree"] + found["walk"] + found["host"]
    return {"draft": found["draft"], "commit": found["commit"], "rest": rest}


def as_a_gpu_has_it(drafter: Drafter) -> Drafter:
    """Return a recurrent drafter that drafts by what a GPU would be sent; others are the same."""
    if not isinstance(drafter, BoundDrafter):
        return drafter
    found = BoundDrafter(drafter.network, drafter.embed, drafter.target, on_gpu=True)
    settle(found)
    return found


def _forget_compiled(drafter: Drafter) -> None:
    searches = getattr(getattr(drafter, "drafter", drafter), "searches", None)
    if isinstance(searches, CompiledDrafts):
        searches.forget()


def by_phase(steps: Iterator[object]) -> dict[str, float]:
    """Return the dispatches of every part of a text's cycles, on the average.

    Args:
        steps: Writes the text, a token at a time.
    """
    counter = CycleCounter()
    with counter.watching():
        next(steps)
        counter.reset()
        for _ in steps:
            pass
    names = ("draft", "tree", "walk", "commit", "host")
    times = {name: counter.drafts if name == "draft" else counter.cycles for name in names}
    return {name: counter.found[name] / max(1, times[name]) for name in names}
