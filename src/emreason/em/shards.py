"""Sharded training by torch's FSDP2: an M-step on float32 pieces over the ranks, whole weights on every rank for everything else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from emreason.em.ranks import most
from emreason.models.batches import Batch, Marks, marks_of
from emreason.models.families import base_causal_lm
from emreason.models.masters import publish
from emreason.models.memory import release_memory
from emreason.scores.scoring import token_logprobs
from emreason.types import UserError


class Shards:
    """What the M-step trains in place of a model: a copy of it, in float32 where it is trained, cut in pieces over the ranks of `mesh`.

    The model has the whole weights while it samples, scores or is saved, and none in an M-step. So all that ranks do unequally they do
    without each other; what they do together is the M-step, `gather` and checkpoints.

    Args:
        whole: the model; its weights are the same on all ranks.
        mesh: [ranks], or [nodes, ranks of a node]: a copy of the pieces in each node.
        seed: of rounding, as in `masters.publish`.

    Raises:
        UserError: the model is quantised.
    """

    def __init__(self, whole: nn.Module, mesh: DeviceMesh, seed: int):
        if any(not p.is_floating_point() or p.element_size() < 2 for p in whole.parameters()):
            raise UserError("The weights of a quantised model cannot be cut in pieces; load it in bfloat16, or use trainer.strategy=auto.")
        self.whole, self.seed, self.fresh = whole, seed, True
        self.ranks = mesh.size()
        self._logprobs = _Logprobs(whole)
        dtype = next(whole.parameters()).dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        base = base_causal_lm(self._logprobs.model)
        layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
        for module in (*layers, self._logprobs):  # a layer at a time is copied
            for parameter in module.parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self._logprobs.train()

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer works on."""
        return [p for p in self._logprobs.parameters() if p.requires_grad]

    def pieces(self) -> list[Tensor]:
        """This rank's piece of each of them, in place."""
        return [p.detach().to_local() for p in self.trained()]  # type: ignore[attr-defined]

    def logprobs(self, batch: Batch) -> Tensor:
        """`token_logprobs`; all ranks call it equally often."""
        found: Tensor = self._logprobs(batch.input_ids, batch.completion_mask, batch.marks)
        return found

    def padded(self, batches: Sequence[Batch], device: torch.device) -> list[Batch]:
        """As many batches as the rank with the most of them has: a layer's weights come together in a pass of all ranks."""
        ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool)
        nothing = Batch(ids, mask, torch.zeros(1), [], marks_of(ids, mask))
        return [*batches, *[nothing] * (most(len(batches), device) - len(batches))]

    def release(self) -> None:
        """The memory of the whole weights, before an M-step."""
        self.fresh = False
        for parameter in self.whole.parameters():
            parameter.data = parameter.data.new_empty(0)
        release_memory()

    @torch.no_grad()
    def gather(self) -> None:
        """Give the model the whole weights, a tensor at a time, unless it has them; a collective."""
        if self.fresh:
            return
        pairs = list(zip(self._logprobs.parameters(), self.whole.parameters(), strict=True))
        for piece, parameter in pairs:
            parameter.data = torch.empty(piece.shape, dtype=parameter.dtype, device=piece.device)
        for piece, parameter in pairs:
            if not parameter.requires_grad:
                parameter.copy_(_full(piece))
        trained = [(piece, parameter) for piece, parameter in pairs if parameter.requires_grad]
        publish((_full(piece) for piece, _ in trained), [parameter for _, parameter in trained], self.seed)
        self.fresh = True

    def state(self, optimizer: Optimizer | None) -> dict[str, Any]:
        """What a checkpoint keeps: the trained pieces, and the optimizer's if one is given. Not copied."""
        state: dict[str, Any] = {"weights": {name: p for name, p in self._logprobs.named_parameters() if p.requires_grad}}
        return state if optimizer is None else state | {"optimizer": get_optimizer_state_dict(self._logprobs, optimizer)}

    def load(self, folder: Path, optimizer: Optimizer | None) -> None:
        """Take what `state` had, saved by any number of ranks.

        Raises:
            UserError: the folder is not there, or not whole.
        """
        state = self.state(optimizer)
        try:
            dcp.load(state, checkpoint_id=folder)
        except Exception as error:
            raise UserError(f"{folder} is not the other part of last.ckpt; restore it, or begin again with overwrite=true.") from error
        if optimizer is not None:
            set_optimizer_state_dict(self._logprobs, optimizer, state["optimizer"])
        self.fresh = False


class _Logprobs(nn.Module):
    """A copy of a model whose forward pass is `token_logprobs`: FSDP2 has the weights together inside forward passes only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}  # the same memory
        self.model = copy.deepcopy(model, own)

    def forward(self, input_ids: Tensor, completion_mask: Tensor, marks: Marks) -> Tensor:
        return token_logprobs(self.model, input_ids, completion_mask, marks=marks, in_layers=True)


def _full(piece: Tensor) -> Tensor:
    assert isinstance(piece, DTensor)
    return piece.full_tensor()
