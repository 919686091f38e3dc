"""Muon on DeepSpeed's ZeRO, which cuts every matrix into shards; a matrix is put together where it is orthogonalised.

DeepSpeed hands an optimizer flat shards in float32. With ZeRO 1 and 2 the parameters of a group are concatenated and
cut into equal pieces, one per process; with ZeRO 3 every parameter is cut by itself, and a process's pieces
are concatenated. Momentum, weight decay and AdamW work element by element, so on shards as they are. Orthogonalising
needs whole matrices: the shards of the update are gathered, each process orthogonalises its share of the matrices, and
the results are added up into everyone's shards. It is the same update as optimizer.Muon's on one process.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from training.optimizer import CombinedOptimizer, orthogonalise_matrices, rows_of_fused_matrices


class Piece(NamedTuple):
    """A run of a parameter's elements inside the flat shard of one process."""

    rank: int
    start: int
    length: int


class Placement(NamedTuple):
    """Where a parameter of a group lies: its pieces, in order, and the matrices that are fused in it."""

    shape: torch.Size
    rows: list[int]
    pieces: list[Piece]


class ZeROMuon(torch.optim.AdamW):
    """Muon for the groups marked is_muon, AdamW for the others, on the flat shards that DeepSpeed makes of them."""

    def __init__(self, optimizer: CombinedOptimizer, config: Any, device: torch.device) -> None:
        """optimizer: of make_muon, for its groups; device: where matrices are gathered and orthogonalised."""
        matrices, others = optimizer.param_groups
        groups = [{**matrices, "is_muon": True}, {**others, "is_muon": False}]
        super().__init__(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0)
        self.device = device
        self.placements: dict[torch.Tensor, list[Placement]] = {}  # by the flat shard of a Muon group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """DeepSpeed calls it group by group, on all processes in the same order."""
        groups = self.param_groups
        for group in groups:
            if group["is_muon"]:
                for shard in group["params"]:
                    self.muon_step(shard, group)
            else:
                self.param_groups = [group]
                super().step()
        self.param_groups = groups

    def muon_step(self, shard: torch.Tensor, group: dict[str, Any]) -> None:
        if "momentum" not in self.state[shard]:
            self.state[shard]["momentum"] = torch.zeros_like(shard)
        momentum = self.state[shard]["momentum"]
        momentum.lerp_(shard.grad, 1 - group["momentum"])
        update = shard.grad.lerp(momentum, group["momentum"])  # Nesterov's look-ahead
        update = self.orthogonalise_shards(update, self.placements[shard])
        shard.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def orthogonalise_shards(self, update: torch.Tensor, placements: list[Placement]) -> torch.Tensor:
        """This process's shard of the orthogonalised update, from everyone's shards of the update."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = update.to(self.device)
        shards = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(shards, mine)
        shares = placements[rank::world_size]
        matrices = [
            torch.cat([shards[p.rank][p.start : p.start + p.length] for p in placement.pieces]).view(placement.shape)
            for placement in shares
        ]
        orthogonalise_matrices(matrices, [placement.rows for placement in shares])
        results = torch.zeros(world_size, mine.numel(), device=self.device)
        for matrix, placement in zip(matrices, shares, strict=True):
            done = 0
            for piece in placement.pieces:
                values = matrix.flatten()[done : done + piece.length]
                results[piece.rank, piece.start : piece.start + piece.length] = values
                done += piece.length
        dist.all_reduce(results)  # every element was computed by one process, and is 0 on the others
        return results[rank].to(update.device)


def place_shards(zero_optimizer: Any, optimizer: ZeROMuon, names: dict[torch.nn.Parameter, str], config: Any) -> None:
    """Tell the optimizer where DeepSpeed has put every matrix, once DeepSpeed has cut them up.

    names: of the model's parameters; config: the ModelConfig.
    """
    world_size = dist.get_world_size()
    is_stage_3 = hasattr(zero_optimizer, "fp16_groups")
    if is_stage_3:  # where a large group is cut into several
        groups, shards = zero_optimizer.fp16_groups, zero_optimizer.fp32_partitioned_groups_flat
        group_of = zero_optimizer.sub_group_to_group_id
    else:
        groups, shards = zero_optimizer.round_robin_bit16_groups, zero_optimizer.single_partition_of_fp32_groups
        group_of = range(len(groups))
    for i, (parameters, shard) in enumerate(zip(groups, shards, strict=True)):
        if not optimizer.param_groups[group_of[i]]["is_muon"]:
            continue
        placements, offset = [], 0
        for j, p in enumerate(parameters):
            shape = getattr(p, "ds_shape", p.shape)
            if is_stage_3:  # equal pieces on all processes, at the same place in each shard; the last ones padded
                size = p.partition_numel()
                lengths = [max(0, min(size, shape.numel() - r * size)) for r in range(world_size)]
                pieces = [Piece(r, offset, n) for r, n in enumerate(lengths) if n]
                offset += size
            else:  # one run in the concatenation of the group, which may cross from one shard into the next
                size = zero_optimizer.partition_size[i]
                first = zero_optimizer.round_robin_bit16_offsets[i][j]
                last = first + shape.numel()
                cuts = [(max(first, r * size), min(last, (r + 1) * size)) for r in range(world_size)]
                pieces = [Piece(r, a - r * size, b - a) for r, (a, b) in enumerate(cuts) if a < b]
            placements.append(Placement(shape, rows_of_fused_matrices(config, names[p], shape[-2]), pieces))
        optimizer.placements[shard] = placements
