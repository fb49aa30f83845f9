"""The LightningModule: Lightning's hooks around the M-step, the evaluation and the checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from emreason.em import checkpoints, ranks
from emreason.em.evaluation import Evaluation
from emreason.em.m_step import MStep, accumulate, clip, scorer
from emreason.em.shards import Shards
from emreason.engines.drawing import draw_seed
from emreason.engines.vllm import VllmEngine
from emreason.models.batches import Step
from emreason.models.masters import master_weights, publish
from emreason.progress import bar
from emreason.questions.prompts import Prompts
from emreason.scores.likelihood import completion_logprobs, marginal_bounds, summarize
from emreason.scores.scoring import Prediction, Stopwatch, predict, score
from emreason.types import Engine, Question


class EMModule(L.LightningModule):
    """A causal LM under EM. Lightning's epoch k is EM iteration k; its train loader holds that iteration's optimizer steps.

    Args:
        model: the transformers (or PEFT) model; the engine samples from the same weights.
        optimizer: makes the optimizer from the parameters, e.g. a partial of `torch.optim.AdamW`.
        seed: of the evaluation's draws, and of rounding.
        extendable: False: the checkpoint of the last iteration does without the optimizer, nobody will train on from it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        prompts: Prompts,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        m_step: MStep,
        evaluation: Evaluation = Evaluation(),  # noqa: B008  (frozen)
        seed: int = 1,
        extendable: bool = True,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints of adapters leave the frozen base out
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine
        self.prompts = prompts
        self.make_optimizer = optimizer
        self.m_step = m_step
        self.evaluation, self.seed, self.extendable = evaluation, seed, extendable
        self.predictions: dict[str, list[Prediction]] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        self.m_step_record: dict[str, Any] = {}
        self.learns = True  # the E-step has something for this iteration's M-step
        self._base = [p.detach().cpu().clone() for p in self.trainable()] if m_step.init == "base" else []
        self._masters: list[nn.Parameter] = []
        self._restored_masters: list[Tensor] | None = None
        self._shards: Shards | None = None
        self._restored_shards: Path | None = None
        if m_step.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters the M-step changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        return batch  # questions stay where they are; a step's batches move one at a time

    def shard(self, mesh: DeviceMesh) -> None:
        """Train pieces of the weights over the ranks of `mesh`."""
        self._shards = Shards(self.model, mesh, self.seed)
        if isinstance(self.engine, VllmEngine):
            self.engine.pieces = mesh.size(mesh.ndim - 1)
        if self.m_step.init == "base":
            self._base = [piece.cpu().clone() for piece in self._shards.pieces()]

    def gather(self) -> None:
        """See that the model has the weights that were trained last; all ranks call it where they may differ in what they do next."""
        if self._shards is not None:
            self._shards.gather()

    # ---- M-step ----------------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        parameters = self.trainable()
        if self._shards is not None:
            optimizer = self.make_optimizer(self._shards.trained())
            if self._restored_shards is not None:
                self._shards.load(self._restored_shards, optimizer if self.m_step.optimizer == "carry" else None)
        elif any(p.dtype == torch.bfloat16 for p in parameters):
            self._masters = master_weights(parameters, self._restored_masters)
            self._restored_masters = None
            optimizer = self.make_optimizer(self._masters)
            optimizer.register_step_post_hook(lambda *_: publish(self._masters, self.trainable(), self.seed))
        else:
            optimizer = self.make_optimizer(parameters)
        warmup = self.m_step.warmup_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_epoch_start(self) -> None:
        self.train()  # models from `from_pretrained` start in eval mode
        self.m_step_record = {}
        self._watch = Stopwatch()
        self._sums, self._steps = torch.zeros(2, dtype=torch.float64), 0
        optimizer: Any = self.optimizers()
        if self.m_step.init == "base" and self.learns:
            with torch.no_grad():
                trained = self.trainable() if self._shards is None else self._shards.pieces()
                for parameter, base in zip(trained, self._base, strict=True):
                    parameter.copy_(base)
                for master, base in zip(self._masters, self._base, strict=False):
                    master.copy_(base)
        if self.m_step.optimizer == "reset":
            optimizer.optimizer.state.clear()
            schedule: Any = self.lr_schedulers()
            schedule.last_epoch = 0
        if self._shards is not None:
            self._shards.release()

    def training_step(self, step: Step, batch_idx: int) -> None:
        """One optimizer step of the filtered gradient update.

        Raises:
            UserError: loss or gradient is not finite; the optimizer step is not taken and the message names the questions.
        """
        torch.manual_seed(draw_seed(self.seed, self.current_epoch, f"dropout {batch_idx}", self.global_rank))  # resumed, too
        optimizer: Any = self.optimizers()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._shards is None:
            totals = accumulate(scorer(self.model), step.batches, self.device, batch_idx)
        else:  # FSDP2 takes the mean over ranks
            batches = self._shards.padded(step.batches, self.device)
            totals = accumulate(self._shards.logprobs, batches, self.device, batch_idx, self._shards.ranks)
        totals = ranks.total(totals).cpu()
        if not totals[1]:
            return  # an iteration skipped for want of accepted rationales
        if self._shards is None:
            ranks.sum_gradients(parameters)
        norm = clip(parameters, self.m_step.max_grad_norm, step, batch_idx)
        schedule: Any = self.lr_schedulers()
        left = 1 - batch_idx / float(self.trainer.num_training_batches) if self.m_step.decay else 1.0
        for group, lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = lr * factor(schedule.last_epoch) * left
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        self._sums, self._steps = self._sums + totals, self._steps + 1
        values = {"m_step/nll": float(totals[0] / totals[1]), "m_step/grad_norm": norm, "m_step/lr": optimizer.param_groups[0]["lr"]}
        self.log_dict({**values, "iteration": float(self.current_epoch)}, on_step=True, on_epoch=False)

    def on_train_end(self) -> None:
        """The test needs neither moments, which Lightning would copy to the host, nor masters, which hooks hold on to."""
        self.gather()
        self._shards = None
        for optimizer in self.trainer.strategy.optimizers:
            optimizer.state.clear()
            optimizer.param_groups.clear()
        for master in self._masters:
            master.data = master.data.new_empty(0)

    def finish_m_step(self) -> dict[str, Any]:
        """This iteration's M-step: mean NLL per supervised token (nats), optimizer steps, supervised tokens, seconds; closed once asked."""
        if not self.m_step_record:
            nll, tokens = self._sums.tolist()
            self.m_step_record = {
                "nll": nll / tokens if tokens else None,
                "steps": self._steps,
                "tokens": int(tokens),
                "seconds": self._watch.seconds,
            }
        return self.m_step_record

    # ---- evaluation ------------------------------------------------------------------------------------------------------------------

    def evaluate(self, mine: list[Question], label: str, n_examples: int = 0) -> tuple[dict[str, Any], list[Prediction]]:
        """SCORE and predictions of this rank's questions together with all other ranks', by greedy generation."""
        watch, settings = Stopwatch(), self.evaluation
        asked: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "n_examples": n_examples, "forced": settings.forced}
        with bar(label, len(mine), "questions", enabled=ranks.rank_and_world()[0] == 0) as progress:
            predictions = predict(mine, self.engine, self.prompts, self.tokenizer, **asked, bar=progress)
        predictions = sorted(ranks.gather(predictions), key=lambda p: p.question_id)
        return score(predictions, watch.seconds, settings.forced), predictions

    def marginal(self, mine: list[Question], label: str) -> dict[str, float | None]:
        """`log_marginal` with its standard error, likewise."""
        rank, world = ranks.rank_and_world()
        # the questions were dealt out in turn, so the first few of all are the first few of each rank
        mine = mine[: max(0, -(-(self.evaluation.bound_questions - rank) // world))]
        shown, scoring = (label, f"{label}, scoring") if rank == 0 else ("", "")
        score_given = functools.partial(completion_logprobs, self.model, label=scoring)
        asked: dict[str, Any] = {"k": self.evaluation.bound, "max_new_tokens": self.evaluation.max_new_tokens, "seed": self.seed}
        bounds = marginal_bounds(mine, self.engine, self.prompts, self.tokenizer, score_given, **asked, label=shown)
        return summarize(sorted(ranks.gather(bounds), key=lambda b: b.question_id))

    def validation_step(self, questions: list[Question], batch_idx: int) -> None:  # noqa: ARG002
        self.finish_m_step()
        self.gather()
        self._evaluation_step(questions, "validation", f"Validation {self.current_epoch}")

    def test_step(self, questions: list[Question], batch_idx: int) -> None:  # noqa: ARG002
        self._evaluation_step(questions, "test", "Test")

    def _evaluation_step(self, questions: list[Question], split: str, label: str) -> None:
        self.scores[split], self.predictions[split] = self.evaluate(questions, label)
        if self.evaluation.bound and split == "validation":
            self.scores[split] |= self.marginal(questions, f"{label}, log-likelihood")
        values = {f"{split}/{k}": float(v) for k, v in self.scores[split].items() if isinstance(v, (int, float))}
        self.log_dict({**values, "iteration": float(self.current_epoch)}, rank_zero_only=False, batch_size=1)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.keep_trainable(checkpoint, self.model)
        if "optimizer_states" not in checkpoint:
            return  # weights alone
        # the optimizer is most of a checkpoint: not where nothing will read it
        ended = self.trainer.should_stop or self.current_epoch + 1 == self.trainer.max_epochs
        keep = self.m_step.optimizer == "carry" and (self.extendable or not ended)
        if self._shards is not None:
            optimizer: Any = self.optimizers()
            checkpoint |= {"state_dict": {}, "shards": self._shards.state(optimizer.optimizer if keep else None)}
        if not keep or self._shards is not None:
            checkpoint["optimizer_states"] = []
        if ended and not self.extendable:
            checkpoint["ended"] = True
            return
        if self._masters:
            checkpoint["master_weights"] = [m.detach() for m in self._masters]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.refuse_ended(checkpoint, self.trainer.max_epochs)
        checkpoints.refuse_other_kind(checkpoint, getattr(self.trainer.strategy, "sharding", None) is not None)
        self._restored_shards = checkpoint.get("shards")
        self._restored_masters = checkpoint.get("master_weights")
