"""What a step of sharded training asks of 8, 64 or 512 ranks, of which only the first is there: torch's fake process group answers it."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from emreason.em.m_step import MStep
from emreason.em.module import EMModule
from emreason.models.batches import Example, Step, collate

SHAPE = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 512}  # 512 ranks have a row each
CALLS = ("c10d", "_c10d_functional")


class Collectives(TorchDispatchMode):
    """Counts what this rank says to others: calls by name, and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does inside is seen, too
        found = func(*args, **(kwargs or {}))
        if func.namespace in CALLS and "wait" not in func.__name__ and "wrap" not in func.__name__:
            self.calls[func.__name__] += 1
            self.bytes += max(sum(t.nbytes for t in tree_leaves(part) if isinstance(t, torch.Tensor)) for part in (args, found))
        return found


def an_iteration(world: int, nodes: int, layers: int) -> tuple[Counter[str], Counter[str], int]:
    """Calls of an optimizer step, calls of gathering the weights after it, and the bytes of both."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        shape = (world,) if nodes == 1 else (nodes, world // nodes)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "pieces")[-len(shape) :])
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers))
        parts: Any = (model, None, None, None)
        module: Any = EMModule(*parts, functools.partial(torch.optim.AdamW, lr=1e-3), MStep(max_grad_norm=0.1, tokens_per_batch=16))
        module.shard(mesh)
        made = module.configure_optimizers()
        module.optimizers, module.lr_schedulers = lambda: made["optimizer"], lambda: made["lr_scheduler"]
        module.log_dict = lambda *_, **__: None
        made["optimizer"].optimizer = made["optimizer"]  # as Lightning wraps it
        module.on_train_epoch_start()
        batches = [collate([Example(name, (1, 2, 3), (4, 5, 6))], [0.5], 0) for name in "ab"]
        with Collectives() as step:
            module.training_step(Step(batches), 0)
        with Collectives() as gathered:
            module.gather()
        return step.calls, gathered.calls, step.bytes + gathered.bytes
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("of_a_node", [None, 8])
def test_what_a_rank_says_in_a_step_does_not_grow_with_the_ranks(of_a_node):
    nodes = {world: world // of_a_node if of_a_node else 1 for world in (16, 512)}
    few, many = (an_iteration(world, nodes[world], 2) for world in nodes)
    assert many[:2] == few[:2]
    assert few[2] / 2 < many[2] <= few[2]  # the rank's own pieces, too, which become smaller
    step, gathered, _ = few
    units = 3  # two layers and the rest
    assert step["_reduce_scatter_base_.default"] == 2 * units  # in each batch
    assert step["_allgather_base_.default"] <= 2 * 2 * units
    assert step["allreduce_.default"] + step["all_reduce.default"] == 3 + (2 * units if of_a_node else 0)
    assert sum(gathered.values()) == 21  # a call a tensor
