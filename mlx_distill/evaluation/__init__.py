"""How well language models predict and answer, as figures with intervals."""
