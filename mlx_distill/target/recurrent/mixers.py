"""Mixers, the modules that are handed recurrent states, taught to take the nodes of a tree.

A mixer is found by watching who is given a cache of states. It runs by its own code, in one of
three ways:

* nodes in a *line* are a run of text to it;
* a mixer whose states all come of convolutions and scans that are known here is *taken apart*:
  those look along each node's ancestors, and the rest does not look at other tokens (``apart``);
* any other gets a *row per node*, which holds the node's ancestors, as a batch of texts (``rows``).

Its weights are read once in all of them.
"""

import functools
from collections.abc import Sequence

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_distill.target.layer_cache import LayerCache, leaves
from mlx_distill.target.recurrent.apart import ApartCall, Scan, named_scans, scanning
from mlx_distill.target.recurrent.rows import RowsCall
from mlx_distill.target.recurrent.view import StatesView, replaced
from mlx_distill.target.tree_layout import TreeLayout
from mlx_distill.target.watching import Call, Heard, listening_once
from mlx_distill.untyped import Called


def wrap_mixers(model: nn.Module) -> None:
    """Teach every mixer of a model to take the nodes of a tree.

    The modules stay where they are, with their parameters and their type; calls with a cache of
    mlx-lm's do what they did.
    """
    caches = make_prompt_cache(model)
    if not any(type(cache) is ArraysCache for cache in leaves(caches)):
        return
    for module in _mixers(model, caches):
        if not isinstance(module, TreeMixer):
            parts = module.modules()
            found = {
                "convolutions": [x for x in parts if isinstance(x, nn.Conv1d)],
                "projections": [x for x in parts if _is_projection(x)],
            }
            module.__dict__.update(found)
            module.__class__ = _taught(type(module))


def _mixers(model: nn.Module, caches: Sequence[LayerCache]) -> list[nn.Module]:
    """Return the innermost modules that are given states."""
    found: list[nn.Module] = []

    def noting(module: nn.Module) -> Call:
        def around(call: Call, *args: object, **kwargs: object) -> object:
            before = len(found)
            output = call(*args, **kwargs)
            given = (type(x) is ArraysCache for x in (*args, *kwargs.values()))
            if len(found) == before and any(given):
                found.append(module)
            return output

        return around

    modules = {id(module): module for module in model.modules()}
    with listening_once([Heard(module, noting(module)) for module in modules.values()]):
        model(mx.array([[1, 2, 3]]), cache=caches)
    return found


def _is_projection(module: nn.Module) -> bool:
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2


@functools.cache
def _taught(kind: type[nn.Module]) -> type:
    """Return a class for the mixers of a kind, under the same name, that takes trees."""
    return type(kind.__name__, (TreeMixer, scanning(kind)), {"scans": named_scans(kind)})


class TreeMixer(Called):
    """Mixed in before a mixer's class.

    Attributes:
        scans: Those that its methods call.
        convolutions: Its parts that look at neighbours.
        projections: Its parts that look at one token at a time.
    """

    scans: Sequence[Scan]
    convolutions: Sequence[nn.Module]
    projections: Sequence[nn.Module]

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the mixer says; with the view of a tree, of all of its nodes."""
        call = super().__call__
        views = (x for x in (*args, *kwargs.values()) if isinstance(x, StatesView))
        view = next(views, None)
        if view is None:
            return call(*args, **kwargs)
        if view.layout.num_nodes == 1:  # a token like any other
            args, kwargs = replaced(args, kwargs, view, view.line)
            return call(*args, **kwargs)
        known = len(self.convolutions) + len(self.scans) == len(view.before)
        layout, made = view.layout, None
        if known and isinstance(layout, TreeLayout):
            made = ApartCall(view, layout, self.convolutions)
        else:
            made = RowsCall(view, self.projections)
        view.calls.append(made)
        return made.run(call, args, kwargs)
