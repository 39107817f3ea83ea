"""Seeds that depend on what is computed, never on when or where."""

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """Return a seed in [0, 2**63) for a key such as (seed, class, index): unlike keys, unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*key: int) -> torch.Generator:
    """Return a generator on the CPU seeded by `seed_of(*key)`, so that its noise is the same on any device."""
    return torch.Generator().manual_seed(seed_of(*key))
