"""Which tokens a token may look at: causality, windows and documents; for SDPA, and in blocks for flex attention.

A mask says it of every pair of places, and SDPA computes all of them. flex attention (Dong et al. 2024,
arXiv:2412.05496) passes over the blocks of 128 x 128 pairs in which no token sees another: the shorter the documents
or the window, the more of them.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def attention_mask(
    T: int, seen: int, window: int, is_causal: bool, documents: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Which keys, `seen` cached ones and then T new ones, the T queries may look at: (T, seen + T) or (B, 1, T, T).

    None where SDPA's own causal flag says it all. documents (B, T): tokens of different ones do not see each other.
    """
    if documents is None and not (window and window < seen + T) and not (is_causal and seen and T > 1):
        return None
    queries, keys = torch.arange(seen, seen + T, device=device)[:, None], torch.arange(seen + T, device=device)
    mask = is_visible(queries, keys, window, is_causal)
    return mask if documents is None else mask & (documents[:, None, :, None] == documents[:, None, None, :])


def is_visible(query: torch.Tensor, key: torch.Tensor, window: int, is_causal: bool) -> torch.Tensor:
    """Whether the token at one place may look at the one at another, if they are of the same document."""
    distance = query - key
    mask = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    return mask & (distance.abs() < window) if window else mask


@torch.compiler.disable  # compiling this may take minutes (github.com/pytorch/pytorch/issues/182060)
def block_masks(
    T: int, windows: set[int], is_causal: bool, documents: torch.Tensor | None, device: torch.device
) -> dict[int, BlockMask | None]:
    """attention_mask() of T tokens for every window, for flex attention."""

    def block_mask(window: int) -> BlockMask | None:
        if documents is None and not (window and window < T):
            return None

        def sees(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            mask = is_visible(query, key, window, is_causal)
            return mask if documents is None else mask & (documents[b, query] == documents[b, key])

        return create_block_mask(sees, None if documents is None else len(documents), None, T, T, device=device)

    return {window: block_mask(window) for window in windows}


def positions_inside(documents: torch.Tensor) -> torch.Tensor:
    """Every token's distance (B, T) from the start of its document, of their numbers (B, T)."""
    place = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place - torch.where(begins, place, 0).cummax(1).values
