"""Orders of batches that only the seed decides."""

import numpy as np


def shuffled_rows(num_rows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return the rows of a step's batch; every epoch is a new order, and no row is left out."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = [
        np.random.default_rng([seed, epoch]).permutation(num_rows)[
            places[places // num_rows == epoch] % num_rows
        ]
        for epoch in sorted(set((places // num_rows).tolist()))
    ]
    return np.concatenate(rows)
