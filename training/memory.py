"""How much memory training takes: an estimate from what the code stores, before the first step.

    memory_estimate(run, batch_size)        # bytes, beside what Python and torch themselves take

Weights and optimizer states are there all the time. The rest comes and goes, and is largest at one of three moments:

    end of the forward pass     all activations that the backward pass needs, and the loss at the logits
    backward pass               the activations still, and the gradients of the output layer, or of the last MLP
    update                      the gradients of all weights, and what the optimizer computes from them

Checked against measurements by bench/memory.py and tests/test_memory.py.
"""

import itertools
import math
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from layers.attention import Attention, FullAttention
from layers.head import logits_per_chunk
from layers.sparse_attention import SparseAttention
from model import GPT, ModelConfig
from text.batches import Samples
from training.optimizer import muon_matrices, rows_of_fused_matrices, trainable_parameters
from vision.encoder import encoder_shape

# A process takes more than its tensors: malloc cuts a margin off every aligned block, so where one was freed between
# two that are kept there is seldom room for the next one of that size. Shares that are lost, fitted to the peaks that
# bench/memory.py measures, with glibc 2.36 (bench/NOTES.md). A GPU has an allocator of its own.
LOST_OF_FREED = 0.8  # of what the blocks free in the forward pass
LOST_OF_LARGEST = 0.1  # of what is alive in the largest of the three moments
LOST_OF_UPDATE = 0.33  # of what the optimizer computes while the gradients lie where the activations were
CPU_RANGE = 0.9, 1.2  # measured peaks lie in this range of the estimate: those of one run differ by 10%


def memory_estimate(run: Any, batch_size: int) -> float:
    """Estimate of the peak memory of a training.setup.Run in bytes, with micro-batches of this size."""
    rows, length = batch_shape(run, batch_size)
    weights = 4 * run.model.parameter_count() + frozen_weights(run)  # float32, also under autocast
    gradients = 4 * trainable_count(run.model)
    is_accumulated = run.config.gradient_accumulation_steps > run.engine.world_size
    has_buckets = isinstance(run.engine.network, DistributedDataParallel)  # whose gradients are never freed
    earlier = gradients if is_accumulated or has_buckets else 0  # those of the micro-batches, or the step, before

    if fills_blocks(run):  # a text and its copy
        length *= 2
    kept = activations(run, rows, length) + vision_activations(run, batch_size)
    loss, loss_backward = output_layer(run, rows * length)
    mlp_backward = rows * length * mlp_gradients(run.model.config, activation_bytes(run.engine))
    moments = (
        earlier + kept + loss,
        earlier + kept + max(loss_backward, mlp_backward),
        gradients + update(run),
    )
    lost = 0.0
    if run.engine.device.type == "cpu":
        lost = LOST_OF_FREED * freed_activations(run, rows, length)
        lost += LOST_OF_LARGEST * max(moments) + LOST_OF_UPDATE * update(run)
    return weights + optimizer_states(run) + max(moments) + lost


def trainable_count(model: GPT) -> int:
    """Number of trainable weights: all of them (which sharding may have emptied), or those of the LoRA adapter."""
    if all(p.requires_grad for p in model.parameters()):
        return model.parameter_count()
    return count(trainable_parameters(model))


def frozen_weights(run: Any) -> int:
    """Bytes of models that are not trained: a teacher's, or those of a reference policy that is asked at every step."""
    models = getattr(run.loss, "teacher", None), getattr(run.batches, "reference", None)
    return sum(4 * model.parameter_count() for model in models if model is not None)


def batch_shape(run: Any, batch_size: int) -> tuple[int, int]:
    """Rows of a micro-batch, and their length in tokens: that of the longest sample, padded."""
    datasets, block_size = run.batches.datasets, run.model.config.block_size
    if not datasets:  # a toy problem
        return batch_size, block_size
    longest = max(dataset.lengths.max() for dataset in datasets) + filling(run)
    pad_to = run.batches.pad_to
    length = min(block_size, math.ceil(longest / pad_to) * pad_to)
    if run.batches.pack_samples:  # several samples a row
        mean = min(block_size, max(dataset.lengths.mean() for dataset in datasets) + filling(run))
        return math.ceil(batch_size * mean / block_size), block_size
    return batch_size * max(dataset.rows_per_sample for dataset in datasets), length


def filling(run: Any) -> int:
    """Tokens at most by which loss diffusion fills up an answer (training/diffusion.py)."""
    is_filled = run.config.loss == "diffusion" and any(isinstance(dataset, Samples) for dataset in run.batches.datasets)
    return (run.config.answer_block - 1) * is_filled


def fills_blocks(run: Any) -> bool:
    """Whether a causal model learns to fill in blocks, by texts with a copy of them (training/diffusion.py)."""
    return run.config.loss == "diffusion" and run.model.config.is_causal


def activation_bytes(engine: Any) -> int:
    """Bytes of a number that a matrix product returns: under autocast those of half precision."""
    return torch.finfo(engine.dtype).bits // 8


# ------------------------------------------------------------------------------------------------------ activations


def activations(run: Any, rows: int, length: int) -> float:
    """Bytes of all tensors that the blocks keep for the backward pass, of a micro-batch (rows, length).

    Counted as in Korthikanti et al. 2022 (arXiv:2205.05198): a product keeps its input, a nonlinearity its argument.
    """
    config, size = run.model.config, activation_bytes(run.engine)
    kinds = kinds_of_attention(config)
    per_token = sum(attention.activations(config, size) for attention in kinds)
    total = rows * length * (per_token + len(kinds) * mlp_activations(config, size))
    total += rows * length * (config.n_future - 1) * module_activations(config, size)
    if config.dropout:  # what is dropped: of the embedding, and of both outputs of every block
        mask_size = 4 if run.engine.device.type == "cpu" else 1
        total += rows * length * config.n_embd * (2 * len(kinds) + 1) * mask_size
    total += attention_weights(run, rows, length)
    if config.n_kv_head < config.n_head and not (run.engine.device.type == "cpu" or run.engine.dtype == torch.bfloat16):
        total += rows * length * len(kinds) * size * 2 * config.n_head * config.head_dim  # masks.takes_groups
    if size < 4:  # autocast keeps copies of the weights of the products
        layers = itertools.chain(run.model.blocks.parameters(), run.model.future.parameters())
        total += size * sum(p.numel() for p in layers if p.dim() >= 2)
    return total


def kinds_of_attention(config: ModelConfig) -> list[type[Attention]]:
    """Of every block that training goes through: those of the modules (n_future) are like the last."""
    return config.attention_classes + config.attention_classes[-1:] * (config.n_future - 1)


def module_activations(config: ModelConfig, size: int) -> int:
    """Bytes per token that a module (n_future) keeps beside its block."""
    return config.n_embd * (4 + 2 * size + 2 * 4)  # the embedding; what is joined; the last norm's input and output


def vision_activations(run: Any, n_images: int) -> float:
    """Bytes that the image encoder keeps for the backward pass, of so many images."""
    if run.model.vision is None:
        return 0.0
    config, size = encoder_shape(run.model.config), activation_bytes(run.engine)
    vision, n_layer = run.model.vision, run.model.config.n_vision_layer
    per_patch = n_layer * (FullAttention.activations(config, size) + mlp_activations(config, size))
    per_patch += max(4, size) * 3 * config.patch_size**2 + 4 * config.n_embd  # pixels as numbers; the patches' vectors
    return n_images * vision.config.n_patches * per_patch


def mlp_activations(config: ModelConfig, size: int) -> int:
    """Bytes per token of one MLP, or of the experts that a token goes through, its norm included."""
    C, H = config.n_embd, config.n_hidden
    kept = 4 * C + size * C  # the norm's input and output
    if config.n_expert:  # per expert: a copy of the token; as in any MLP; the output, and the output times its gate
        per_expert = C + 4 * H + 2 * C
        return kept + size * (config.n_expert_per_token * per_expert + 4 * config.n_shared_expert * H)
    return kept + size * H * (4 if config.mlp == "swiglu" else 2)  # gate, up, silu(gate), the product; or two of them


def freed_activations(run: Any, rows: int, length: int) -> float:
    """Bytes of all tensors that the blocks make and free in the forward pass, of a micro-batch (rows, length)."""
    config, size = run.model.config, activation_bytes(run.engine)
    C = config.n_embd
    freed = 2 * size * C  # what both halves of a block add to the residual stream
    if size < 4:
        freed += 4 * 2 * C  # both norms' outputs, before they are rounded
    if config.dropout:
        freed += 2 * size * C  # before a part of it is dropped
        freed += size * (3 * config.n_head * length + C)  # attention's weights, thrice; the values, copied
    if config.n_expert:
        freed += size * config.n_expert_per_token * C  # the experts' outputs times their gates
    elif config.mlp == "relu2":
        freed += size * config.n_hidden  # the argument of relu
    if run.adapter:  # what an adapted layer returns without its adapter; into larger ones than these, what follows fits
        freed += size * C * len({"out", "down"} & {*run.adapter["settings"]["targets"]})
    kinds = kinds_of_attention(config)
    in_attention = sum(attention.freed_activations(config, size) for attention in kinds)
    for _ in range(kinds.count(SparseAttention)):
        has_documents = run.config.mask_documents or run.config.pack_samples
        n = length if has_documents else length / config.sparse_block_size  # blocks that a row may have
        numbers = config.head_dim * (2 + n / length) + 4 * n  # copies of q and k; the means; the scores
        in_attention += config.n_kv_head * (size * numbers + 2 * n + 2 * length)  # and which blocks and keys are chosen
        in_attention += config.n_head * length + 14 * length * has_documents
    in_modules = (config.n_future - 1) * config.n_embd * 2 * 4  # both norms' outputs, before they are joined
    return rows * length * (len(kinds) * freed + in_attention + in_modules)


def mlp_gradients(config: ModelConfig, size: int) -> int:
    """Bytes per token in the last MLP's backward pass, beside what it kept: of the residual stream and inside."""
    H = config.n_hidden * (config.n_expert_per_token if config.n_expert else 1)
    return 3 * 4 * config.n_embd + size * H * (1 if config.mlp == "gelu" else 2)


def attention_weights(run: Any, rows: int, length: int) -> float:
    """Bytes of tensors (length, length) that attention keeps: masks, and where no kernel avoids it the weights."""
    config, engine = run.model.config, run.engine
    size = activation_bytes(engine)
    n_sparse = kinds_of_attention(config).count(SparseAttention)
    n_layer = sum(not attention.IS_RECURRENT for attention in kinds_of_attention(config))
    total = n_sparse * rows * config.n_head * length**2 * size  # masks, as numbers that are added to the scores
    drops_weights = config.dropout > 0 and engine.device.type == "cpu"  # no kernel there drops any
    if drops_weights or run.config.sdp_kernel == "math":
        per_head = 3 if drops_weights else 1  # the weights; which are dropped; those that are left
        total += n_layer * rows * config.n_head * length**2 * size * per_head
        total += n_layer * rows * length * size * config.n_embd  # the values, copied for the product with them
    if run.model.use_flex:
        return total
    if run.config.mask_documents or run.config.pack_samples or filling(run) or fills_blocks(run):
        # a mask per row, which every layer turns into numbers
        total += rows * length**2 * (1 + (n_layer - n_sparse) * size)
        total += rows * length * 2 * sum(set(run.model.rope_widths)) * 4  # RoPE's angles of positions that restart
    return total


# ------------------------------------------------------------------------------------------------------ output layer


def output_layer(run: Any, tokens: int) -> tuple[float, float]:
    """Bytes at the loss: at the end of the forward pass, and at the beginning of the backward pass."""
    config, engine = run.model.config, run.engine
    size, name = activation_bytes(engine), run.config.loss
    hidden = 4 * tokens * config.n_embd  # the last norm's input, its output, their gradient
    logits = tokens * config.vocab_size
    d_weight = 4 * config.vocab_size * config.n_embd * run.model.lm_head.weight.requires_grad
    if name == "distill":  # two networks' logits; then float32: log-probabilities, softened ones, their divergence
        return 2 * hidden + logits * (2 * size + 6 * 4), 2 * hidden + logits * 6 * 4 + d_weight
    if name in ("next_token", "diffusion") and engine.dtype == torch.float16:  # (which takes the logits at once)
        hidden, logits = config.n_future * hidden, config.n_future * logits
        return 2 * hidden + logits * (size + 4 + 4), 2 * hidden + logits * (4 + 4 + size) + d_weight
    chunk = min(logits, logits_per_chunk(engine.device))
    half = chunk * size if size < 4 else 0  # the product in half precision, before the softmax's float32
    if name in ("next_token", "diffusion"):
        # in chunks, with the gradients of hidden and weight computed in the forward pass
        n = config.n_future - 1  # the modules' losses, all in one, come before; of them the gradients are kept
        before = n * hidden + d_weight * (n > 0)
        here, there = chunk_bytes(run, tokens), chunk_bytes(run, n * tokens)
        forward = max(before + 3 * hidden + here, 3 * n * hidden + there) + d_weight
        return forward, before + 4 * hidden + 2 * d_weight
    kept = 4 * logits  # the log-probabilities of all targets: their gradient is not known yet
    return 2 * hidden + kept + half + 4 * chunk, 3 * hidden + kept + half + 2 * 4 * chunk + 2 * d_weight


def chunk_bytes(run: Any, tokens: int) -> float:
    """Bytes of what the loss of so many tokens needs for one chunk of them at a time."""
    config, size = run.model.config, activation_bytes(run.engine)
    chunk = min(tokens * config.vocab_size, logits_per_chunk(run.engine.device))
    weight = config.vocab_size * config.n_embd
    is_one_pass = run.engine.device.type == "cuda" and run.engine.use_compile  # the gradient takes the logits' place
    total = chunk * size  # logits
    total += weight * size * run.model.lm_head.weight.requires_grad  # a chunk's share of the weight's gradient
    if not is_one_pass:  # log-probabilities; in half precision the gradient, too
        total += chunk * (4 + size * (size < 4))
    if size < 4:  # copies of hidden and weight
        total += size * (tokens * config.n_embd + weight)
    return total


# ------------------------------------------------------------------------------------------------------ optimizer


def optimizer_states(run: Any) -> int:
    """Bytes of the moments, float32: AdamW has two of every weight, Muon and SGD one."""
    one_moment = {"muon": muon_matrices, "sgd": trainable_parameters}.get(run.config.optimizer, lambda _: {})
    return 4 * (2 * trainable_count(run.model) - count(one_moment(run.model)))


def update(run: Any) -> float:
    """Bytes of what an optimizer computes beside the gradients. AdamW's fused kernel needs nothing."""
    if run.config.optimizer == "sgd":  # a gradient with the weight decay added
        return 4.0 * max(p.numel() for p in trainable_parameters(run.model).values())
    if run.config.optimizer != "muon":
        return 0.0
    matrices, counts = muon_matrices(run.model), {}  # by shape: the number of matrices, which go through one product
    for name, p in matrices.items():
        *experts, n_rows, n_columns = p.shape
        for n in rows_of_fused_matrices(run.model.config, name, n_rows):
            shape = n, n_columns
            counts[shape] = counts.get(shape, 0) + math.prod(experts)
    size = 4 if run.engine.device.type == "cpu" else 2  # orthogonalise() works in bfloat16 on a GPU
    stacks = [
        n * (4 * a * b + size * (2 * a * b + 2 * min(a, b) ** 2))  # the stack; X before and after; A and B
        for (a, b), n in counts.items()
    ]
    return 4 * count(matrices) + max(stacks, default=0)


def count(parameters: dict[str, torch.Tensor]) -> int:
    """Numbers in all of them."""
    return sum(p.numel() for p in parameters.values())
