"""A drafter's model card: what it is, how it was made, and what was measured."""

from collections.abc import Mapping
from typing import Any

from mlx_distill.arrays import num_values
from mlx_distill.drafters.medusa import MedusaConfig
from mlx_distill.drafters.networks import Network
from mlx_distill.drafters.recurrent import RecurrentDrafterConfig
from mlx_distill.names import for_markdown

_KINDS = {
    RecurrentDrafterConfig.model_type: "A recurrent drafter",
    MedusaConfig.model_type: "A drafter of Medusa heads,",
}


def card(
    name: str,
    network: Network,
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    rows: Mapping[str, Any],
    log: list[dict[str, Any]],
    kept: Mapping[str, Any],
) -> str:
    """Return the card.

    Args:
        name: Of the drafter's folder.
        network: The drafter.
        settings: What it was made with: ``config``, ``target``, and perhaps ``data``,
            ``start_from``, ``adapter_path``, ``chat_template_config``.
        counts: Of answers and tokens that were learned, of answers held out, and of the most drafts
            that a step has.
        rows: What became of the rows of the data, as a report says it.
        log: Of the training.
        kept: The entry of the log whose weights the drafter has, with its figures.
    """
    shape = network.config
    config = settings["config"]
    data = ", ".join(for_markdown(one) for one in settings.get("data", ()))
    return f"""# {for_markdown(name)}
{_KINDS[shape.model_type]} of {num_values(network.parameters()):,} parameters for one target: \
hidden size {shape.hidden_size}, {shape.vocab_size:,} tokens, tokenizer hash \
{settings["target"]["tokenizer_hash"]}. It drafts \
{shape.draft_vocab_size or shape.vocab_size:,} of the tokens. It is useless on its own, and it \
never changes what its target writes: the target verifies every token.

Trained with `python -m mlx_distill.train_drafter` on {counts["answers"]:,} answers \
({counts["tokens"]:,} tokens) that the target wrote to prompts from {data or "elsewhere"}; \
{log[-1]["step"]:,} steps of at most {counts["drafts"]:,} drafts; the settings and the log are in \
`training.json`.{_best(log, kept)}{_more(settings)}{_dropped(rows)}

{_acceptance(counts["held_out"], config["unroll"], kept)}

{_confidence(shape.sharpness, kept)}The licence is that of the target.
"""


def _best(log: list[dict[str, Any]], kept: Mapping[str, Any]) -> str:
    """Return which weights were kept, as a sentence, where they are not the last ones."""
    if kept["step"] == log[-1]["step"]:
        return ""
    return f" The weights are those of step {kept['step']:,}, the best on held-out answers."


def _more(settings: Mapping[str, Any]) -> str:
    """Return what else decided what was learned, as sentences."""
    sentences = {
        "start_from": " It started from {}.",
        "adapter_path": " The target had the adapters {}.",
        "chat_template_config": " Its chat template was given {}.",
    }
    return "".join(
        sentence.format(for_markdown(str(settings[name])))
        for name, sentence in sentences.items()
        if settings.get(name)
    )


def _confidence(sharpness: float, last: Mapping[str, Any]) -> str:
    """Return how sure the drafter is of its paths, as a paragraph."""
    if "calibration_error" not in last:
        return ""
    return (
        f"Paths are weighed with logits times {sharpness:g}, fitted on these answers: expected "
        f"calibration error of paths {last['calibration_error']:.3f}, "
        f"{last['calibration_error_before']:.3f} without.\n\n"
    )


def _dropped(rows: Mapping[str, Any]) -> str:
    reasons = [f"{one['count']} {reason}" for reason, one in rows["dropped"].items()]
    return f" Of {rows['rows']:,} rows were not used: {'; '.join(reasons)}." if reasons else ""


def _acceptance(held_out: int, length: int, kept: Mapping[str, Any]) -> str:
    """Return what was measured by depth, as far as held-out answers reach.

    Args:
        held_out: How many there are.
        length: Of a draft.
        kept: The figures.
    """
    pairs = list(zip(kept["acceptance_greedy"], kept["acceptance_sampled"], strict=True))
    if not pairs:
        return (
            f"Acceptance was not measured: the {held_out} held-out answers, chosen by seed, have "
            "one token each."
        )
    rows = "\n".join(
        f"| {depth} | {greedy:.3f} | {sampled:.3f} |"
        for depth, (greedy, sampled) in enumerate(pairs, start=1)
    )
    deeper = f"\n\nDeeper than {len(pairs)} no held-out answer reaches." * (len(pairs) < length)
    return f"""\
Acceptance of a drafted chain on {held_out} held-out answers, chosen by seed, by depth: how often \
the drafter's best token is the target's (greedy), and the target's probability of it \
(temperature 1).

| depth | greedy | temperature 1 |
|---|---|---|
{rows}{deeper}"""
