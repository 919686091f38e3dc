"""The encoder: an image becomes vectors, which the text model reads in the place of embeddings of tokens.

    encoder = VisionEncoder(config, blocks)     # blocks: of the shape encoder_shape(config)
    x = encoder(images)                         # (N, 3, image_size, image_size) uint8 -> (N, n_patches, n_embd)

The image is cut into squares of patch_size x patch_size pixels. A patch is a vector of 3 patch_size^2 numbers, which
one matrix projects to the width of the model (ViT, Dosovitskiy et al. 2020, arXiv:2010.11929): what an embedding is to
a token, this projection is to a patch. Blocks of full attention may follow, in which every patch sees every other one;
in the text model, whose attention is causal, a patch sees only those before it.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn as nn

from base.configuration import UserError

CONTRAST = 6  # black as a number: the larger, the more a step changes what is seen (bench/NOTES.md has the trials)


def check_vision(config: Any) -> None:
    """Raises UserError where the image fields of a ModelConfig do not fit together."""
    if config.image_size % config.patch_size:
        raise UserError(f"image_size ({config.image_size}) must be divisible by patch_size ({config.patch_size})")
    if config.n_patches >= config.block_size:
        raise UserError(
            f"an image has {config.n_patches:,} patches, the window (block_size) {config.block_size:,} tokens: "
            "raise block_size or patch_size"
        )
    if config.image_size and config.n_future > 1:
        raise UserError(f"n_future {config.n_future} is for models of text alone: a patch is no token to predict")
    if config.image_size and not config.is_causal:
        raise UserError("image_size is for models that answer about images: set is_causal to true")


def encoder_shape(config: Any) -> Any:
    """The ModelConfig of the encoder's blocks: the text model's, but with full attention and dense MLPs."""
    plain = {"attention": ["full"], "n_expert": 0, "shortcut_experts": False}
    plain |= dict.fromkeys(("kv_rank", "q_rank", "rope_dim", "sparse_block_size", "sparse_top_k"))
    positions = {"use_rope": False, "rope_scaling": "none", "attention_window": [], "is_causal": False}
    return dataclasses.replace(config, **plain, **positions, n_layer=max(1, config.n_vision_layer), image_size=0)


def patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images (N, C, S, S) as patches (N, n_patches, C patch_size^2): row by row from the top left.

    Within a patch, too: channel by channel, and in each row by row. So a matrix over patches computes the same as a
    convolution with a kernel and a stride of patch_size.
    """
    N, C, S, _ = images.shape
    n = S // patch_size  # patches in a row
    x = images.reshape(N, C, n, patch_size, n, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(N, n * n, C * patch_size * patch_size)


class VisionEncoder(nn.Module):
    """Patches, projected, with a learned embedding of their places added, and through blocks of full attention, if any.

    Without blocks the text model does all the seeing (as in Fuyu, adept.ai/blog/fuyu-8b): for small pictures the faster
    way to learn (docs/vision.md has the figures).
    """

    def __init__(self, config: Any, blocks: list[nn.Module]) -> None:
        """config: a ModelConfig (image_size, patch_size, n_patches, n_embd)."""
        super().__init__()
        self.config = config
        self.projection = nn.Linear(3 * config.patch_size**2, config.n_embd)
        self.position = nn.Parameter(torch.zeros(config.n_patches, config.n_embd))  # two dimensions, learned as one
        self.blocks = nn.ModuleList(blocks)
        matrices = [p.numel() for module in (self.projection, self.blocks) for p in module.parameters() if p.dim() >= 2]
        self._n_matrix_weights = sum(matrices)  # counted here, because sharding empties parameters later

    def initialise(self) -> None:
        """Weights for pixels that are divided by sqrt(n), see forward(); positions as large as projected patches are.

        Where must not be lost beside what.
        """
        std = 0.02 * math.sqrt(self.projection.in_features)
        nn.init.normal_(self.projection.weight, std=std)
        nn.init.normal_(self.position, std=std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, image_size, image_size), numbers 0 to 255 -> (N, n_patches, n_embd)."""
        x = CONTRAST * (1 - patches(images, self.config.patch_size).to(self.position.dtype) / 255)  # white is 0
        # Adam moves every weight equally far: n inputs that agree, as the pixels of a background do, would move a sum n
        # times as far as an embedding. With inputs / sqrt(n), and so larger weights, it is less (arXiv:2203.03466).
        x = self.projection(x / math.sqrt(self.projection.in_features)) + self.position
        for block in self.blocks:
            x = block(x, None)
        return x

    def flops_per_image(self) -> float:
        """Operations to train on one image, forward and backward: see GPT.flops_per_token."""
        n, config = self.config.n_patches, self.config
        in_attention = sum(type(block.attention).flops_per_token(config, n) for block in self.blocks)
        return n * (6.0 * self._n_matrix_weights + in_attention)


def put_patches(
    encoder: VisionEncoder | None, images: torch.Tensor, x: torch.Tensor, is_patch: torch.Tensor
) -> torch.Tensor:
    """x (B, T, n_embd) with the vectors of images (N, 3, S, S) in the places where is_patch (B, T), in order.

    Raises UserError for images to a model of text alone and, on a CPU, where places and patches differ in number.
    """
    if encoder is None:
        raise UserError("this model reads text alone (image_size 0), and there are images")
    n_patches = len(images) * encoder.config.n_patches
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and is_patch.sum() != n_patches:
        raise UserError(f"{n_patches} patches of {len(images)} images for {is_patch.sum()} places")
    if not len(images):  # rows of text alone: one that goes nowhere, as in DDP every process must use all weights
        images = images.new_zeros(1, *images.shape[1:])
    return x.masked_scatter(is_patch[..., None], encoder(images).to(x.dtype))
