"""Noise schedule, DDIM, guidance, the plain sampler and the candidate pool: pure functions of arrays."""
