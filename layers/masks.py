"""Attention masks: which tokens a query attends to, by causality, sliding window and document.

    0 1 2 3 4      query 4 with a window of 3: keys 2, 3, 4
    a a b b b      query 4 with documents a and b: keys 2, 3, 4 (a block-diagonal mask)

attention_mask() gives SDPA a boolean tensor; SDPA still computes every query-key pair. block_masks() describes the same
mask to flex attention (Dong et al. 2024, arXiv:2412.05496), which skips blocks of 128 x 128 pairs that are masked
entirely: the shorter the documents or the window, the more blocks it skips.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # of flex attention's kernels


def attention_mask(
    T: int, window: int, is_causal: bool, documents: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """True where a query attends to a key: (T, T), or (B, 1, T, T) with documents. (KVCache.mask: behind a cache.)

    documents (B, T): document ids; tokens attend only within their document. window 0: no sliding window. None where
    SDPA's is_causal flag suffices: without a mask tensor it can use its fastest kernels.
    """
    if documents is None and not 0 < window < T:
        return None
    position = torch.arange(T, device=device)
    mask = is_visible(position[:, None], position, window, is_causal)  # (T, T)
    return mask if documents is None else mask & (documents[:, None, :, None] == documents[:, None, None, :])


def is_visible(query: torch.Tensor, key: torch.Tensor, window: int, is_causal: bool) -> torch.Tensor:
    """Whether the token at position `query` attends to the one at position `key`, documents aside."""
    distance = query - key
    mask = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    return mask & (distance.abs() < window) if window else mask  # a window counts the token itself


def copies_mask(blocks: torch.Tensor, window: int, documents: torch.Tensor | None) -> torch.Tensor:
    """True where a query attends to a key (B, 1, 2 T, 2 T), in rows that hold a text and then a copy of it.

    blocks (B, T): the block of every position, ascending. The text is causal. A position of the copy sees what of the
    text lies before its block, and all of its block in the copy.

        blocks 0 0 1 1                text 0 1 2 3    copy 0 1 2 3
        query 3 of the text sees           x x x x         . . . .
        query 3 of the copy sees           x x . .         . . x x
    """
    position = torch.arange(blocks.size(1), device=blocks.device)
    query, key = blocks[:, :, None], blocks[:, None, :]
    causal = is_visible(position[:, None], position, window, is_causal=True).expand_as(query == key)
    near = is_visible(position[:, None], position, window, is_causal=False)
    of_text = torch.cat((causal, torch.zeros_like(causal)), dim=2)  # (B, T, 2 T)
    of_copy = torch.cat(((key < query) & near, (key == query) & near), dim=2)
    mask = torch.cat((of_text, of_copy), dim=1)[:, None]
    if documents is None:
        return mask
    documents = documents.repeat(1, 2)
    return mask & (documents[:, None, :, None] == documents[:, None, None, :])


def block_masks(
    T: int, windows: set[int], is_causal: bool, documents: torch.Tensor | None, device: torch.device
) -> dict[int, BlockMask | None]:
    """attention_mask() of T tokens as flex attention's BlockMask, one per distinct window."""
    if torch.compiler.is_compiling():  # which may take minutes (github.com/pytorch/pytorch/issues/182060)
        return torch.compiler.disable(block_masks)(T, windows, is_causal, documents, device)

    def block_mask(window: int) -> BlockMask | None:
        if documents is None:
            return window_mask(T, window, is_causal, device) if window and window < T else None

        def mask_mod(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return is_visible(query, key, window, is_causal) & (documents[b, query] == documents[b, key])

        return make_block_mask(mask_mod, window, is_causal, documents)

    return {window: block_mask(window) for window in windows}


@functools.lru_cache(maxsize=16)
def window_mask(T: int, window: int, is_causal: bool, device: torch.device) -> BlockMask:
    """The mask of a sliding window alone: of every sequence, every head and every batch, so it is made once."""
    one_document = torch.zeros(1, T, dtype=torch.long, device=device)
    return make_block_mask(
        lambda b, h, query, key: is_visible(query, key, window, is_causal), window, is_causal, one_document
    )


def make_block_mask(mask_mod: Callable, window: int, is_causal: bool, documents: torch.Tensor) -> BlockMask:
    """Which blocks of BLOCK x BLOCK pairs mask_mod allows wholly, in part or not at all, for documents (B, T).

    torch's create_block_mask() asks mask_mod about every pair. Here a block is told by its corners: by how far its
    queries and keys are from each other, and by the first and last documents in both.
    """
    T = documents.size(1)
    n = math.ceil(T / BLOCK)
    padding = documents[:, -1:].expand(-1, n * BLOCK - T)
    parts = torch.cat((documents, padding), dim=1).view(-1, n, BLOCK)
    first, last = parts.amin(2), parts.amax(2)  # (B, n)
    block = torch.arange(n, device=documents.device)
    steps = block[:, None] - block  # from the key's block to the query's: distances are BLOCK steps -+ (BLOCK - 1)
    some, all_ = torch.ones_like(steps, dtype=torch.bool), torch.ones_like(steps, dtype=torch.bool)
    if is_causal:
        some, all_ = steps >= 0, steps > 0
    if window:
        some = some & (BLOCK * steps.abs() - (BLOCK - 1) < window)
        all_ = all_ & (BLOCK * steps.abs() + (BLOCK - 1) < window)
    if T % BLOCK:  # what lies beyond the end is not allowed
        all_ = all_ & (block[:, None] < n - 1) & (block < n - 1)
    some = some & (first[:, :, None] <= last[:, None]) & (first[:, None] <= last[:, :, None])  # (B, n, n)
    all_ = all_ & (first[:, :, None] == last[:, None]) & (first[:, None] == last[:, :, None])
    arguments = []
    for blocks in (some & ~all_, all_):
        indices = blocks.int().argsort(dim=-1, descending=True, stable=True)  # those that are allowed come first
        arguments += blocks.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]  # (B, 1, n), (B, 1, n, n)
    return BlockMask.from_kv_blocks(*arguments, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(T, T))


def takes_groups(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether SDPA has a kernel for fewer key/value heads than query heads; else they have to be repeated.

    On a CPU it has. On a GPU flash attention is one, which takes bfloat16 without a mask; with enable_gqa and others,
    torch would compute and store all attention weights (T, T).
    """
    is_flash = q.is_cuda and q.dtype == torch.bfloat16 and mask is None and torch.backends.cuda.flash_sdp_enabled()
    return q.device.type == "cpu" or is_flash


def positions_inside(documents: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T) that restart at 0 in every document; documents (B, T): document ids.

    Document ids [1, 1, 1, 2, 2] give [0, 1, 2, 0, 1].
    """
    position = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(is_first, position, 0).cummax(1).values  # of each token's document
    return position - start
