"""The LightningModule: the M-step's weighted NLL, and evaluation by generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from emreason.em.m_step import MStep
from emreason.em.steps import Step
from emreason.models.masters import master_weights, publish
from emreason.progress import bar
from emreason.questions.prompts import Prompts
from emreason.scores.likelihood import completion_logprobs, marginal_bounds, summarize
from emreason.scores.scoring import Prediction, Stopwatch, predict, score, token_logprobs
from emreason.types import Engine, Question, UserError


class EMModule(L.LightningModule):
    """A causal LM under EM. Lightning's epoch k is EM iteration k; its train loader holds that iteration's optimizer steps.

    Args:
        model: the transformers (or PEFT) model; the engine samples from the same weights.
        optimizer: makes the optimizer from the parameters, e.g. a partial of `torch.optim.AdamW`.
        max_new_tokens: of greedy evaluation.
        forced: also measure accuracy with a forced answer line.
        bound: K > 0: validation also estimates log π(y*|x) from K draws of each of the first `bound_questions` questions.
        seed: of those draws, and of rounding.
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
        max_new_tokens: int = 256,
        forced: bool = True,
        bound: int = 0,
        bound_questions: int = 32,
        seed: int = 1,
        extendable: bool = True,
    ):
        if bound < 0 or bound_questions < 1:
            raise UserError(
                f"evaluation.bound={bound}, evaluation.bound_questions={bound_questions}: at least 0 draws of at least 1 question."
            )
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints of adapters leave the frozen base out
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine
        self.prompts = prompts
        self.make_optimizer = optimizer
        self.m_step = m_step
        self.max_new_tokens = max_new_tokens
        self.forced = forced
        self.bound, self.bound_questions, self.seed, self.extendable = bound, bound_questions, seed, extendable
        self.predictions: dict[str, list[Prediction]] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        self.m_step_record: dict[str, Any] = {}
        self._base = [p.detach().cpu().clone() for p in self.trainable()] if m_step.init == "base" else []
        self._masters: list[nn.Parameter] = []
        self._restored_masters: list[Tensor] | None = None
        if m_step.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters the M-step changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        return batch  # questions stay where they are; a step's batches move one at a time

    # ---- M-step ----------------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        parameters = self.trainable()
        if any(p.dtype == torch.bfloat16 for p in parameters):
            self._masters = master_weights(parameters, self._restored_masters)
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
        self._sums = {"nll": 0.0, "tokens": 0.0, "steps": 0.0}
        optimizer = self._optimizer()
        if self.m_step.init == "base":
            with torch.no_grad():
                for parameter, base in zip(self.trainable(), self._base, strict=True):
                    parameter.copy_(base)
                for master, base in zip(self._masters, self._base, strict=False):
                    master.copy_(base)
        if self.m_step.optimizer == "reset":
            optimizer.state.clear()
            schedule: Any = self.lr_schedulers()
            schedule.last_epoch = 0

    def _optimizer(self) -> Optimizer:
        optimizer: Any = self.optimizers()
        return optimizer.optimizer

    def training_step(self, step: Step, batch_idx: int) -> None:
        """One optimizer step of the filtered gradient update, paper eq. for the M-step: Σᵢ rᵢ ∇ log π(ẑᵢ, ŷᵢ | xᵢ; θ).

        Raises:
            UserError: loss or gradient is not finite; the optimizer step is not taken and the message names the questions.
        """
        optimizer: Any = self.optimizers()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nll, tokens = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for batch in step.batches:
            batch = batch.to(self.device)
            logprobs = token_logprobs(self.model, batch.input_ids, batch.completion_mask)
            per_row = torch.zeros_like(batch.weights).index_add(0, batch.row_of_token, -logprobs)
            loss = (per_row * batch.weights).sum()
            if not torch.isfinite(loss):
                raise _not_finite("loss", batch_idx, [batch.question_ids])
            loss.backward()  # not manual_backward: DDP would all-reduce every batch, and ranks may have different numbers of them
            nll += per_row.detach().sum()
            tokens += len(logprobs)
        if not self._any_rank(bool(step.batches)):
            return  # an iteration skipped for want of accepted rationales
        self._reduce_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise _not_finite("gradient", batch_idx, [b.question_ids for b in step.batches])
        if self.m_step.max_grad_norm is not None and norm > self.m_step.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.m_step.max_grad_norm, norm)
        schedule: Any = self.lr_schedulers()
        left = 1 - batch_idx / float(self.trainer.num_training_batches) if self.m_step.decay else 1.0
        for group, lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = lr * factor(schedule.last_epoch) * left
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        totals = self._reduce(torch.tensor([float(nll), float(tokens)], dtype=torch.float64))
        self._sums = {
            "nll": self._sums["nll"] + float(totals[0]),
            "tokens": self._sums["tokens"] + float(totals[1]),
            "steps": self._sums["steps"] + 1,
        }
        values = {"m_step/nll": float(totals[0] / totals[1]), "m_step/grad_norm": float(norm), "m_step/lr": optimizer.param_groups[0]["lr"]}
        self.log_dict({**values, "iteration": float(self.current_epoch)}, on_step=True, on_epoch=False)

    def finish_m_step(self) -> dict[str, Any]:
        """This iteration's M-step: mean NLL per supervised token (nats), optimizer steps, supervised tokens, seconds; closed once asked."""
        if not self.m_step_record:
            sums = self._sums
            self.m_step_record = {
                "nll": sums["nll"] / sums["tokens"] if sums["tokens"] else None,
                "steps": int(sums["steps"]),
                "tokens": int(sums["tokens"]),
                "seconds": self._watch.seconds,
            }
        return self.m_step_record

    # ---- ranks -----------------------------------------------------------------------------------------------------------------------

    def _reduce(self, values: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def _any_rank(self, value: bool) -> bool:
        return bool(self._reduce(torch.tensor([float(value)]))[0] > 0)

    def _reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over ranks. The weights of a step's rationales already hold the normalisation, so it is a sum, not a mean."""
        if dist.is_available() and dist.is_initialized():
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks, on every rank."""
        if not (dist.is_available() and dist.is_initialized()):
            return items
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    # ---- evaluation by generation ----------------------------------------------------------------------------------------------------

    def evaluate(self, questions: list[Question], label: str, n_examples: int = 0) -> tuple[dict[str, Any], list[Prediction]]:
        """SCORE and predictions of this rank's `questions` together with all other ranks'."""
        watch = Stopwatch()
        with bar(label, len(questions), "questions", enabled=self.global_rank == 0) as progress:
            mine = predict(
                questions,
                self.engine,
                self.prompts,
                self.tokenizer,
                max_new_tokens=self.max_new_tokens,
                n_examples=n_examples,
                forced=self.forced,
                bar=progress,
            )
        predictions = sorted(self.gather(mine), key=lambda p: p.question_id)
        return score(predictions, watch.seconds, self.forced), predictions

    def marginal(self, questions: list[Question], label: str) -> dict[str, float | None]:
        """`log_marginal` with its standard error, from this rank's `questions` together with all other ranks'."""
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        # the questions were dealt out in turn, so the first few of all are the first few of each rank
        mine = questions[: max(0, -(-(self.bound_questions - self.global_rank) // world))]
        score_given = functools.partial(completion_logprobs, self.model)
        with bar(label, len(mine), "questions", enabled=self.global_rank == 0) as progress:
            parts = (self.engine, self.prompts, self.tokenizer, score_given)
            bounds = marginal_bounds(mine, *parts, k=self.bound, max_new_tokens=self.max_new_tokens, seed=self.seed, bar=progress)
        return summarize(sorted(self.gather(bounds), key=lambda b: b.question_id))

    def validation_step(self, questions: list[Question], batch_idx: int) -> None:  # noqa: ARG002
        self.finish_m_step()
        self._evaluation_step(questions, "validation", f"Validation {self.current_epoch}")

    def test_step(self, questions: list[Question], batch_idx: int) -> None:  # noqa: ARG002
        self._evaluation_step(questions, "test", "Test")

    def _evaluation_step(self, questions: list[Question], split: str, label: str) -> None:
        self.scores[split], self.predictions[split] = self.evaluate(questions, label)
        if self.bound and split == "validation":
            self.scores[split] |= self.marginal(questions, f"{label}, log-likelihood")
        values = {f"{split}/{k}": float(v) for k, v in self.scores[split].items() if isinstance(v, (int, float))}
        self.log_dict({**values, "iteration": float(self.current_epoch)}, rank_zero_only=False, batch_size=1)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {f"model.{name}" for name, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        if "optimizer_states" not in checkpoint:
            return  # weights alone
        # the optimizer is most of a checkpoint: not where nothing will read it
        ended = self.trainer.should_stop or self.current_epoch + 1 == self.trainer.max_epochs
        if ended and not self.extendable:
            checkpoint |= {"optimizer_states": [], "ended": True}
            return
        if self.m_step.optimizer == "reset":
            checkpoint["optimizer_states"] = []
        if self._masters:
            checkpoint["master_weights"] = [m.detach() for m in self._masters]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError where training would go on without the optimizer's state."""
        if checkpoint.get("ended"):
            done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
            if self.trainer.max_epochs is None or self.trainer.max_epochs > done:
                raise UserError(
                    f"This run had come to its end after {done} iterations and, with keep_checkpoints=false, kept no optimizer to go on "
                    f"with: finish it with trainer.max_epochs={done} and the token_budget it had, or begin again with overwrite=true."
                )
        self._restored_masters = checkpoint.get("master_weights")


def _not_finite(what: str, step: int, question_ids: Sequence[Sequence[str]]) -> UserError:
    names = ", ".join(sorted({i for ids in question_ids for i in ids})[:20])
    return UserError(
        f"The {what} of optimizer step {step} is not finite (questions {names}); nothing was updated and the last checkpoint is intact: "
        "lower optimizer.lr, set m_step.max_grad_norm, or use engine.dtype=float32."
    )
