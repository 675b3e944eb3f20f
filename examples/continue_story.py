"""Write a story in turns: the prompt cache holds the text so far, so each turn reads only its own.

python examples/continue_story.py
"""

from mlx_lm.models.cache import make_prompt_cache

import mlx_distill
from mlx_distill.checkpoint import bundled

TURNS = ("Once upon a time there was a small boat.", " Then the wind came", " In the end")


def main() -> None:
    """Write three turns with the bundled pair."""
    model, tokenizer = mlx_distill.load(bundled("stories-14m"))
    drafter = mlx_distill.load_drafter(bundled("stories-14m-redrafter"), model, tokenizer)
    cache = make_prompt_cache(model)
    for number, turn in enumerate(TURNS):
        tokens = tokenizer.encode(turn, add_special_tokens=number == 0)
        print(turn, end="", flush=True)
        response = None
        for response in mlx_distill.stream_generate(
            model,
            tokenizer,
            tokens,
            drafter=drafter,
            max_tokens=80,
            stop=["\n"],
            prompt_cache=cache,
        ):
            print(response.text, end="", flush=True)
        assert response is not None
        print(f"\n[{response.tokens_per_call:.2f} tokens per call of the model]")


if __name__ == "__main__":
    main()
