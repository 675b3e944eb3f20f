"""A drafter that learns from what it is used for.

    with Learner("learned", drafter, model, tokenizer) as learner:
        for prompt in prompts:
            answer = stream_generate(model, tokenizer, prompt, drafter=learner.drafter)
            for response in learner.listen(answer):
                print(response.text, end="")
            learner.learn()

What the target computed while it wrote an answer is kept in a folder, up to a bound. Between two
answers, never inside one, the drafter takes a few steps on answers of the folder; where it drafts
worse than before on some that are held out, the steps are taken back. A text never depends on its
drafter, so nothing of this changes one.

    learning.json           whose folder it is, and what was learned so far
    texts/                  answers with the target's features; every fifth is held out
    config.json, model.safetensors   the drafter, in float32; a folder that ``--drafter`` takes
    optimizer.safetensors   the moments of its training

All of it stays on this machine; the drafter that it began with is never written to.
"""

import copy
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.arrays import to_number
from mlx_distill.data.tokens import usable_tokenizer
from mlx_distill.distillation.answer_writing import writer
from mlx_distill.distillation.drafted_head import drafted_logits
from mlx_distill.distillation.drafter import Logits, Past, Starts, TargetView, drafter_loss
from mlx_distill.distillation.drafter_config import DrafterTraining
from mlx_distill.distillation.drafter_trainer import acceptance
from mlx_distill.distillation.learning_folder import Learned, LearningFolder
from mlx_distill.distillation.recording import Recording
from mlx_distill.distillation.replay import Replay
from mlx_distill.distillation.teachers import Answers
from mlx_distill.drafters.bound import BoundDrafter
from mlx_distill.drafters.learning_config import LearningConfig
from mlx_distill.drafters.protocol import DraftState, Features
from mlx_distill.drafters.registry import load_drafter
from mlx_distill.errors import InputError
from mlx_distill.hashes import weights_hash
from mlx_distill.limits import check_value
from mlx_distill.target.target import Target
from mlx_distill.training.masters import Masters
from mlx_distill.training.quick_steps import QuickSteps

LEARNED_TEXTS, JUDGED_TEXTS = 64, 32  # of a round, the newest among them
STARTS = 256  # of a step
Item = TypeVar("Item")


class Learner:
    """Lets a drafter learn from the answers that it is used for; see the module.

    Args:
        folder: Of what is learned; made if it is not there. Held for this learner alone until it is
            closed.
        drafter: A recurrent one, as it was loaded, quantised or not.
        model: Its target.
        tokenizer: The target's.
        config: How much is learned.

    Attributes:
        drafter: The latest; a text that is being written keeps the one that it began with.

    Raises:
        InputError: If that drafter cannot learn, or the folder cannot be used: of another drafter
            or model, damaged, not to be written to, or held by another run.
    """

    drafter: BoundDrafter

    def __init__(
        self,
        folder: str | Path,
        drafter: Any,
        model: nn.Module,
        tokenizer: Any,
        config: LearningConfig | None = None,
    ):
        check_value("config", config, LearningConfig | None)
        self.config, tokenizer = config or LearningConfig(), usable_tokenizer(tokenizer)
        if not isinstance(drafter, BoundDrafter):
            raise InputError(f"a {type(drafter).__name__} cannot learn from use")
        self._answers = Answers(Target.of(model).model, texts=True)
        if self._answers.body is None:
            raise InputError("this model's head could not be found, so no drafter learns from it")
        self._ends = set(tokenizer.eos_token_ids)
        self._texts: list[Recording] = []
        shape = drafter.config
        self._shape = DrafterTraining(
            context_blocks=shape.context_blocks, context_window=shape.context_window, starts=STARTS
        )
        known = {"drafter": weights_hash(drafter.network), "target": writer(model, tokenizer)}
        self._open = ExitStack()
        try:
            self._folder = self._open.enter_context(LearningFolder.held(folder, known))
            texts, size = self._folder.texts, int(1e6 * self.config.learn_mb)
            embed, dtype = _in_float32(drafter.embed), drafter.embed(mx.array([0])).dtype
            target, widths = Target.of(model), [shape.hidden_size, *(None for _ in shape.taps)]
            try:
                self._replay = Replay(texts, size, embed, dtype, target.vocab_size, widths)
            except InputError as error:
                raise self._folder.damaged(str(error)) from None
            self._begin(drafter, model, tokenizer)
        except BaseException:
            self._open.close()
            raise

    def _begin(self, drafter: BoundDrafter, model: nn.Module, tokenizer: Any) -> None:
        """Take up what was learned, or the drafter as it is."""
        latest, weights = drafter, self._folder.weights()
        if weights is not None:
            learned = load_drafter(self._folder.path, model, tokenizer)
            if not isinstance(learned, BoundDrafter) or learned.config != drafter.config:
                raise self._folder.damaged("its drafter has another shape")
            latest = learned
        self._network = copy.deepcopy(latest.network)  # a new one would draw random numbers
        self._network.set_dtype(mx.float32)
        self._network.load_weights(list((weights or {}).items()), strict=False)
        self._type = latest.network.head.weight.dtype
        self._embed, self._target = drafter.embed, drafter.target
        self._masters = Masters(self._network)
        self._optimizer = optim.AdamW(
            self.config.learn_rate, weight_decay=0.0, bias_correction=True
        )
        self._optimizer.init(self._masters.arrays)
        moments = self._folder.moments(dict(tree_flatten(self._optimizer.state)))
        if moments is not None:
            self._optimizer.state = tree_unflatten(list(moments.items()))
            self._optimizer.learning_rate = self.config.learn_rate
        self._quick = QuickSteps(self._network, self._loss, self._masters, self._optimizer, 1.0)
        self._logits: Logits | None = None
        self.drafter = self._bound()

    def _bound(self) -> BoundDrafter:
        """Return the drafter as it is now, in the target's type."""
        network = copy.deepcopy(self._network)
        network.set_dtype(self._type)
        network.eval()
        return BoundDrafter(network, self._embed, self._target)

    def __enter__(self) -> "Learner":
        """Return the learner."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the folder."""
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._open.close()

    def listen(self, responses: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Yield what ``stream_generate`` yields; what was written with the drafter is kept."""
        drafter = self.drafter

        def recorded(state: DraftState, prompt: mx.array, features: Features) -> DraftState:
            self._texts.append(Recording(state, prompt, features))
            return self._texts[-1]

        drafter.opened = recorded
        try:
            with closing(responses):
                yield from responses
        finally:
            drafter.opened = None

    def learn(self) -> Learned | None:
        """Learn from what was heard; None where nothing can be learned, or judged, yet.

        Raises:
            InputError: If the folder cannot be written.
        """
        heard, self._texts = self._texts, []
        texts = [one.text().until(self._ends) for one in heard]
        texts = [t for t in texts if len(t.tokens) >= t.num_prompt + 2 and t.is_finite]
        if not texts:
            return None
        self._folder.write()  # whose folder it is, before anything else
        new = [self._replay.add(text) for text in texts]
        self._folder.record["answers"] += len(new)
        found = self._round(new)
        if found is not None:
            self._folder.record["kept" if found.kept else "taken_back"] += 1
            self._folder.record["latest"] = asdict(found)
        self._folder.write()
        return found

    def _round(self, new: list[int]) -> Learned | None:
        """Take some steps; keep them if the drafter is no worse for it."""
        learned, judged = self._replay.numbers(held_out=False), self._replay.numbers(held_out=True)
        if len(learned) < self.config.learn_least or not judged:
            return None
        random = np.random.default_rng([self._folder.record["answers"], 19])
        view = self._replay.view(_some(learned, new, random))
        held_out = self._replay.view(judged[-JUDGED_TEXTS:])
        if self._logits is None:
            token_ids = self._network.get("token_ids")
            self._logits = drafted_logits(self._answers, view.goals[:4], token_ids)
        before = self._score(held_out)
        arrays = self._masters.arrays
        steps = self._steps(view, random)
        found = Learned(steps, before, self._score(held_out))
        if found.kept:
            moments: dict[str, mx.array] = dict(tree_flatten(self._optimizer.state))
            self._folder.save(self._network, self._target, moments)
            self.drafter = self._bound()
        else:  # the moments stay: the longer a mean, the better
            self._masters.put(arrays)
        return found

    def _steps(self, view: TargetView, random: np.random.Generator) -> int:
        """Take as many steps as there is time for, and return their number."""
        places, start = np.array(view.starting), time.perf_counter()
        for done in range(self.config.learn_steps):
            if done and time.perf_counter() - start > self.config.learn_seconds:
                return done
            # As many each time, so that one step is compiled.
            chosen = random.choice(places, self._shape.starts, replace=True).astype(np.int32)
            starts = view.starts(mx.array(chosen), self._shape.unroll, self._shape.look_back)
            mx.eval(self._quick(starts))
        return self.config.learn_steps

    def _score(self, view: TargetView) -> float:
        """Return how many drafted tokens of a chain are taken."""
        assert self._logits is not None
        shares = acceptance(self._network, view, self._logits, self._shape)
        return float(to_number(mx.cumprod(shares, axis=1).sum(axis=1).mean()))

    def _loss(self, starts: Any) -> tuple[mx.array, mx.array]:
        starts = Starts(*starts)  # compiled steps are given bare tuples
        if starts.past is not None:
            starts = starts._replace(past=Past(*starts.past))
        assert self._logits is not None
        return drafter_loss(self._network, starts, self._logits, self._shape.decay)


def _some(learned: list[int], new: list[int], random: np.random.Generator) -> list[int]:
    """Return the texts of a round: new ones, and older ones beside them."""
    new = [number for number in new if number in learned][-LEARNED_TEXTS:]
    older = [number for number in learned if number not in new]
    count = min(len(older), LEARNED_TEXTS - len(new))
    return [*new, *random.choice(older, count, replace=False).tolist()]


def _in_float32(embed: nn.Module) -> Callable[[mx.array], mx.array]:
    return lambda tokens: embed(tokens).astype(mx.float32)
