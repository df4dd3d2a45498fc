"""NEFTune: uniform noise on what the embedding gives, in training alone.

Source: Jain et al. 2023, NEFTune, algorithm 1; transformers' ``neftune_noise_alpha``, which counts
the padding of a row as its length, where a document's own tokens are counted here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phi3_plugin.device import sent


def noisy(h: Tensor, lengths: Sequence[int] | None, alpha: float) -> Tensor:
    """Return embeddings with noise of at most alpha / sqrt(tokens of the document x width).

    Args:
        h: Embeddings, [B, S, D].
        lengths: Tokens of each document of a row, S in all; None is a document a row.
        alpha: 5 is what the paper began with.
    """
    sizes = torch.tensor(lengths or (h.shape[1],))
    scale = alpha / (sizes * h.shape[2]).sqrt()
    scale = scale.repeat_interleave(sizes, output_size=h.shape[1])
    noise = torch.empty_like(h).uniform_(-1, 1)
    return h + noise * sent(scale.to(h.dtype), h.device)[:, None]
