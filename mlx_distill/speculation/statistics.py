"""What a generation did, counted."""

from dataclasses import dataclass, field


@dataclass
class DraftCounters:
    """Counts over the cycles of one generation.

    Args:
        target_calls: Forward passes of the target, prefill not counted.
        drafted_tokens: Tokens that the drafter proposed for verification.
        verified_tokens: Tree nodes sent to the target, the certain ones included.
        beam_tokens: What the paths of the same trees would have cost without sharing prefixes.
        accepted_depths: Number of cycles that accepted at least so many tokens; index 0 is one.
    """

    target_calls: int = 0
    drafted_tokens: int = 0
    verified_tokens: int = 0
    beam_tokens: int = 0
    accepted_depths: list[int] = field(default_factory=list)

    def add(self, parents: list[int], num_accepted: int) -> None:
        """Count one cycle: the tree's parents, and how many drafted tokens were accepted."""
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        leaves = set(range(len(parents))) - set(parents[1:])
        self.target_calls += 1
        self.drafted_tokens += len(parents) - 1
        self.verified_tokens += len(parents)
        self.beam_tokens += sum(depths[leaf] + 1 for leaf in leaves)
        missing = max(depths) - len(self.accepted_depths)
        self.accepted_depths += [0] * missing
        for depth in range(num_accepted):
            self.accepted_depths[depth] += 1

    def add_plain(self) -> None:
        """Count a call on a single token."""
        self.target_calls += 1
        self.verified_tokens += 1
        self.beam_tokens += 1

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the cycles that accepted at least 1, 2, ... drafted tokens."""
        return [count / self.target_calls for count in self.accepted_depths]
