"""The E-step as a Lightning callback, pulled by the data module: shard, sample, gather, journal."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from emreason import __version__
from emreason.em.datamodule import RationaleDataModule
from emreason.em.module import EMModule
from emreason.em.steps import Step, make_steps
from emreason.models.batches import Example
from emreason.models.loading import weights_fingerprint
from emreason.models.memory import keep_freed_memory, map_large_blocks, release_memory
from emreason.progress import bar, doing
from emreason.runs.journal import Journal
from emreason.schemes.choice import choose
from emreason.schemes.diagnostics import describe
from emreason.schemes.samplers import Scheme, is_settled, is_trivial, sample, training_ids
from emreason.schemes.weights import effective_sample_size, log_mean_weight, normalized, remembered, score_weights, weigh
from emreason.scores.likelihood import completion_logprobs
from emreason.scores.probes import faithful
from emreason.scores.scoring import Stopwatch, mean
from emreason.scores.stats import chance_acceptance
from emreason.types import Question, Rationale, UserError, plain

log = logging.getLogger(__name__)


def iterations_done(trainer: L.Trainer) -> int:
    """EM iterations completed, also right after a resume, where `trainer.current_epoch` is stale."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


class EStep(Callback):
    """Samples this iteration's rationales when Lightning asks for the train loader.

    Args:
        scheme: the sampling scheme.
        questions: the training questions of all ranks.
        journal: where every attempt is written as it happens.
        seed: the run's seed; a draw depends on (seed, iteration, question id, attempt) alone.
        faithfulness: also measure `probes.faithful` of the accepted rationales.
    """

    def __init__(self, scheme: Scheme, questions: Sequence[Question], journal: Journal, seed: int, faithfulness: bool = False):
        self.scheme = scheme
        self.questions = list(questions)
        self.journal = journal
        self.seed = seed
        self.faithfulness = faithfulness
        self.record: dict[str, Any] = {}
        self._steps: tuple[int, list[Step]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            datamodule = getattr(trainer, "datamodule", None)
            if not isinstance(datamodule, RationaleDataModule) or not isinstance(pl_module, EMModule):
                raise TypeError("EStep works with EMModule and RationaleDataModule")
            datamodule.pull = lambda: self.pull(trainer, pl_module)

    def pull(self, trainer: L.Trainer, module: EMModule) -> list[Step]:
        """The optimizer steps of the coming iteration; samples its rationales unless that is done already."""
        iteration = iterations_done(trainer)
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= iteration:
            return [Step([])]  # a finished run asks once more
        if self._steps is None or self._steps[0] != iteration:
            self._steps = (iteration, self.run(trainer, module, iteration))
        return self._steps[1]

    def run(self, trainer: L.Trainer, module: EMModule, iteration: int) -> list[Step]:
        """One E-step over all ranks, and the M-step's work made from it.

        Raises:
            UserError: nothing was accepted and `m_step.on_zero_accepted` is `error`; or the journal was drawn under other conditions.
        """
        watch = Stopwatch()
        self.journal.check(iteration, self.conditions(module), write=trainer.is_global_zero)
        replayed = self.journal.read(iteration)
        trainer.strategy.barrier("journal read")
        past = [self.journal.read(i) for i in range(iteration)] if self.scheme.needs_past else []
        questions = choose(self.questions, self.scheme, past, self.seed)
        mine = questions[trainer.global_rank :: trainer.world_size]
        attempts = self._sample(mine, replayed, trainer, module, iteration)
        by_id = {q.id: q for q in self.questions}
        if self.scheme.weighs_by_importance:
            score = functools.partial(completion_logprobs, module.model)
            with doing(f"E-step {iteration}, importance weights of {len(attempts)} rationales"):
                attempts = score_weights(attempts, by_id, self.scheme, module.prompts, score, iteration)
        memory: dict[str, Rationale] = {}
        for drawn in past:
            memory = remembered(drawn, memory)
        weighed = weigh(module.gather(attempts), self.scheme, seed=self.seed, iteration=iteration, memory=memory)
        order = {question.id: i for i, question in enumerate(self.questions)}
        weighed = sorted(weighed, key=lambda r: (order[r.question_id], r.iteration, r.attempt))
        everything = [r for r in weighed if r.iteration == iteration]
        if trainer.is_global_zero:
            self.journal.finalize(iteration, (self.journal_record(by_id[r.question_id], r) for r in everything))
            if errored := [r.question_id for r in everything if r.finish_reason == "error"]:
                log.warning(
                    "E-step %d: %d of %d questions do not fit the model's context and sit out: %s",
                    iteration, len(errored), len(questions), plain(", ".join(errored[:5])),
                )  # fmt: skip
        trainer.strategy.barrier("journal written")
        self.record = e_step_record(iteration, questions, everything, self.scheme, watch.seconds)
        if self.faithfulness:
            accepted = [r for r in attempts if r.accepted]
            with doing(f"E-step {iteration}, faithfulness of {len(accepted)} rationales"):
                agree = module.gather(faithful(accepted, by_id, module.engine, module.prompts, module.tokenizer))
            self.record["faithful_rate"] = mean(agree)
        release_memory()  # the engine's cache, before the M-step's activations
        map_large_blocks()
        return self._make_steps(trainer, module, iteration, weighed, len(questions))

    def _sample(
        self, mine: Sequence[Question], replayed: Sequence[Rationale], trainer: L.Trainer, module: EMModule, iteration: int
    ) -> list[Rationale]:
        by_id = {question.id: question for question in mine}
        attempts = [r for r in replayed if r.question_id in by_id]
        of_question: dict[str, list[Rationale]] = {}
        for rationale in attempts:
            of_question.setdefault(rationale.question_id, []).append(rationale)
        accepted = {r.question_id for r in attempts if r.accepted}
        settled = sum(is_settled(group, self.scheme) for group in of_question.values())
        label = f"E-step {iteration}"
        with (
            self.journal.appending(iteration, trainer.global_rank, trainer.world_size) as lines,
            bar(label, len(mine), "questions", enabled=trainer.is_global_zero) as progress,
        ):
            progress.update(settled, 0, "resumed" if settled else "")
            for rationale in sample(
                mine, self.scheme, module.engine, module.prompts, module.tokenizer, seed=self.seed, iteration=iteration, replayed=attempts
            ):
                lines.append(self.journal_record(by_id[rationale.question_id], rationale))
                attempts.append(rationale)
                of_question.setdefault(rationale.question_id, []).append(rationale)
                if rationale.accepted:
                    accepted.add(rationale.question_id)
                done = is_settled(of_question[rationale.question_id], self.scheme)
                progress.update(int(done), rationale.n_tokens, f"accepted {len(accepted) / len(of_question):.0%}")
        return attempts

    @staticmethod
    def journal_record(question: Question, rationale: Rationale) -> dict[str, Any]:
        """A journal line: the attempt, and the question and gold answer for whoever reads it."""
        return {**dataclasses.asdict(rationale), "question": question.text, "gold": question.answer}

    def _make_steps(
        self, trainer: L.Trainer, module: EMModule, iteration: int, attempts: Sequence[Rationale], n_questions: int
    ) -> list[Step]:
        kept = [r for r in attempts if r.weight != 0]
        if not kept:
            # accepted, and yet nothing to learn: under `rloo` and `trice` where every draw is as good as the others
            if module.m_step.on_zero_accepted == "skip" or any(r.accepted for r in attempts):
                return [Step([])]  # no loader at all would end the fit without a word
            raise UserError(
                f"E-step {iteration}: none of {n_questions} questions was answered correctly in {len(attempts)} attempts "
                f"({_shares(attempts)}); raise sampler.budget or sampler.max_new_tokens, show worked examples (sampler.worked_examples=2), "
                "or set m_step.on_zero_accepted=skip."
            )
        by_id = {question.id: question for question in self.questions}
        eos, pad = module.tokenizer.eos_token_id, module.tokenizer.pad_token_id
        examples = [
            Example(r.question_id, module.prompts.ids(by_id[r.question_id], "question", 0), training_ids(r, eos), r.weight) for r in kept
        ]
        m_step = module.m_step
        return make_steps(
            examples,
            n_questions,
            epochs=m_step.epochs,
            batch_size=m_step.batch_size,
            tokens_per_batch=m_step.tokens_per_batch,
            normalize=m_step.normalize,
            pad_id=eos if pad is None else pad,
            seed=int.from_bytes(hashlib.blake2b(f"{self.seed}/{iteration}".encode(), digest_size=4).digest(), "little"),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def conditions(self, module: EMModule) -> dict[str, Any]:
        """What the draws of an E-step depend on; a journal drawn under other conditions is not replayed."""
        questions = hashlib.blake2b(digest_size=8)
        for question in self.questions:
            questions.update(repr((question.id, question.text, question.choices, question.answer)).encode("utf-8", "surrogatepass"))
        scheme = dataclasses.asdict(self.scheme)
        scheme["proposals"] = list(self.scheme.tries)
        return {
            "weights": weights_fingerprint(module.model),
            "questions": questions.hexdigest(),
            "prompts": module.prompts.fingerprint(),
            **{f"sampler.{key}": value for key, value in scheme.items() if key != "display"},
            "seed": self.seed,
            "code": __version__,
        }

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # `log` is not allowed while the loader is made, so the E-step's numbers are logged here
        values = {f"e_step/{k}": float(v) for k, v in self.record.items() if isinstance(v, (int, float)) and k != "iteration"}
        pl_module.log_dict({**values, "iteration": float(trainer.current_epoch)})

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        release_memory()  # the M-step's activations, before the engine takes its cache
        keep_freed_memory()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        release_memory()  # the engine's cache


def e_step_record(
    iteration: int, questions: Sequence[Question], attempts: Sequence[Rationale], scheme: Scheme, seconds: float
) -> dict[str, Any]:
    """The E-step's numbers. Every question is accepted, rejected or errored; every sampled token is charged, discarded or not.

    `chance_acceptance` is what a uniform guesser over the choices would reach with the same number of tries; None for free answers.
    """
    accepted = [r for r in attempts if r.accepted]
    solved = {r.question_id for r in accepted}
    errored = {r.question_id for r in attempts if r.finish_reason == "error"}
    first = [r for r in attempts if r.attempt == 1]
    chances = [chance_acceptance(len(q.choices), scheme.n_tries(iteration)) for q in questions if q.choices]
    trivial = [r for r in accepted if is_trivial(r.text)]
    return {
        "iteration": iteration,
        "questions": len(questions),
        "accepted": len(solved),
        "rejected": len(questions) - len(solved | errored),
        "errored": len(errored - solved),
        "rationales": sum(r.weight > 0 for r in accepted),
        "rejected_trained": sum(r.weight < 0 for r in attempts),
        "attempts": len(attempts),
        "acceptance_rate": len(solved) / len(questions),
        "first_try_rate": sum(r.accepted for r in first) / len(questions),
        "chance_acceptance": mean(chances),
        "extraction_rate": mean(r.answer is not None for r in attempts),
        "truncated_rate": mean(r.finish_reason == "length" for r in attempts),
        **describe(accepted),
        "trivial_tokens_mean": mean(r.n_tokens for r in trivial),
        "tokens": sum(r.n_tokens for r in attempts),
        "rationale_tokens_mean": mean(r.n_tokens for r in accepted),
        **_importance_record(accepted, scheme),
        "seconds": seconds,
    }


def _importance_record(accepted: Sequence[Rationale], scheme: Scheme) -> dict[str, float | None]:
    """Of the questions with a correct draw: the mean effective sample size of the K weights, and the importance-sampling estimate of
    log π(y*|x). Questions without one would enter the latter as −∞, so it is too high by what they are worse.
    """
    if not scheme.weighs_by_importance:
        return {}
    groups: dict[str, list[Rationale]] = {}
    for rationale in accepted:
        groups.setdefault(rationale.question_id, []).append(rationale)
    return {
        "effective_sample_size": mean(effective_sample_size(normalized(group, scheme)) for group in groups.values()),
        "log_marginal_iw": mean(log_mean_weight(group, scheme) for group in groups.values()),
    }


def _shares(attempts: Sequence[Rationale]) -> str:
    n = max(len(attempts), 1)
    without = sum(r.answer is None for r in attempts) / n
    truncated = sum(r.finish_reason == "length" for r in attempts) / n
    return f"{without:.0%} had no answer line, {truncated:.0%} were truncated"
