"""The head of LAION's aesthetic predictor V2, on the image embeddings of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from spo_jax.models.layers import Dense

# The layers by their number in the published file; those left out are dropout.
WIDTHS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


class AestheticHead(nn.Module):
    """Five linear layers without anything between them. It takes embeddings of length 1."""

    @nn.compact
    def __call__(self, embeddings: Float[Array, "b 768"]) -> Float[Array, " b"]:
        x = embeddings
        for number, width in WIDTHS.items():
            x = Dense(width, name=f"layers_{number}")(x)
        return x[:, 0]
