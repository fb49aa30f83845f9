"""The E-step as a Lightning callback, pulled by the data module: shard, sample into the journal, gather, weigh."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from emreason import __version__
from emreason.em.datamodule import RationaleDataModule
from emreason.em.module import EMModule
from emreason.em.ranks import gather
from emreason.em.steps import steps_of
from emreason.models.batches import Step
from emreason.models.loading import weights_fingerprint
from emreason.models.memory import keep_freed_memory, map_large_blocks, release_memory
from emreason.progress import bar, say
from emreason.runs.journal import Journal, journal_record
from emreason.schemes.chain import remembered
from emreason.schemes.choice import choose
from emreason.schemes.diagnostics import e_step_record, shares
from emreason.schemes.samplers import Scheme, by_question, is_settled, sample
from emreason.schemes.weights import score_weights, weigh
from emreason.scores.likelihood import completion_logprobs
from emreason.scores.probes import faithful
from emreason.scores.scoring import Stopwatch, mean
from emreason.types import EngineApart, Question, Rationale, plain

log = logging.getLogger(__name__)

GAP_SAMPLE = 8
"""Attempts of a rank that the model scores, too, where the engine has weights of its own."""


def iterations_done(trainer: L.Trainer) -> int:
    """EM iterations completed, also right after a resume, where `trainer.current_epoch` is stale."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


class EStep(Callback):
    """Samples this iteration's rationales when Lightning asks for the train loader.

    Args:
        questions: the training questions of all ranks.
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
        module.gather()
        self.journal.check(iteration, self.conditions(module), write=trainer.is_global_zero)
        replayed = self.journal.read(iteration)
        before = max((r.seconds for r in replayed), default=0.0)
        trainer.strategy.barrier("journal read")
        past = [self.journal.read(i) for i in range(iteration)] if self.scheme.persists or self.scheme.choose == "adaptive" else []
        questions = choose(self.questions, self.scheme, past, self.seed)
        mine = questions[trainer.global_rank :: trainer.world_size]
        attempts = self.draw(mine, module, replayed, iteration, lambda: before + watch.seconds)
        by_id = {q.id: q for q in self.questions}
        memory: dict[str, Rationale] = functools.reduce(lambda known, drawn: remembered(drawn, known, self.seed), past, {})
        if self.scheme.needs_scores:
            label = f"E-step {iteration}, scoring" if trainer.is_global_zero else ""
            score = functools.partial(completion_logprobs, module.model, label=label)
            attempts = score_weights(attempts, by_id, self.scheme, module.prompts, score, iteration, memory)
        weighed = weigh(gather(attempts), self.scheme, seed=self.seed, iteration=iteration, memory=memory)
        order = {question.id: i for i, question in enumerate(self.questions)}
        weighed = sorted(weighed, key=lambda r: (order[r.question_id], r.iteration, r.attempt))
        everything = [r for r in weighed if r.iteration == iteration]
        module.learns = any(r.weight for r in weighed)
        if trainer.is_global_zero:
            self.journal.finalize(iteration, (journal_record(by_id[r.question_id], r) for r in everything))
            if errored := [r.question_id for r in everything if r.finish_reason == "error"]:
                log.warning(
                    "E-step %d: %d of %d questions do not fit the model's context and sit out: %s",
                    iteration, len(errored), len(questions), plain(", ".join(errored[:5])),
                )  # fmt: skip
        trainer.strategy.barrier("journal written")
        self.record = e_step_record(iteration, questions, everything, self.scheme, before + watch.seconds)
        if self.scheme.persists:  # trained on beside this iteration's `rationales`
            self.record["kept"] = sum(r.weight > 0 for r in weighed if r.iteration < iteration)
        if trainer.is_global_zero and everything and self.record["extraction_rate"] < 0.5 and not self.scheme.n_examples(iteration):
            say(
                f"E-step {iteration}: {shares(everything)}; worked examples show the form (dataset.demonstrations, sampler.worked_examples)"
            )
        if self.faithfulness:
            accepted = [r for r in attempts if r.accepted]
            asked = sum(r.answer is not None for r in accepted)
            with bar(f"E-step {iteration}, faithfulness", asked, "rationales", enabled=trainer.is_global_zero) as progress:
                agree = gather(faithful(accepted, by_id, module.engine, module.prompts, module.tokenizer, progress))
            self.record["faithful_rate"] = mean(agree)
        if isinstance(module.engine, EngineApart):
            self.record["logprob_gap"] = mean(gather(self._gaps(attempts, by_id, module, iteration)))
            module.engine.rest()
        release_memory()  # the engine's cache, before the M-step's activations
        map_large_blocks()
        which = {"seed": self.seed, "iteration": iteration, "rank": trainer.global_rank, "world_size": trainer.world_size}
        return steps_of(weighed, by_id, len(questions), module.prompts, module.m_step, **which)

    def draw(
        self, mine: Sequence[Question], module: EMModule, replayed: Sequence[Rationale], iteration: int, seconds: Callable[[], float]
    ) -> list[Rationale]:
        """All attempts at this rank's questions: those of `replayed`, then new ones, each in the journal before it counts.

        `seconds`: of this E-step so far.
        """
        by_id = {question.id: question for question in mine}
        attempts = [r for r in replayed if r.question_id in by_id]
        of_question = by_question(attempts)
        accepted = {r.question_id for r in attempts if r.accepted}
        settled = sum(is_settled(group, self.scheme) for group in of_question.values())
        trainer = module.trainer
        with (
            self.journal.appending(iteration, trainer.global_rank, trainer.world_size) as lines,
            bar(f"E-step {iteration}", len(mine), "questions", resumed=settled, enabled=trainer.is_global_zero) as progress,
        ):
            parts = (module.engine, module.prompts, module.tokenizer)
            for rationale in sample(mine, self.scheme, *parts, seed=self.seed, iteration=iteration, replayed=attempts):
                rationale = dataclasses.replace(rationale, seconds=round(seconds(), 3))
                lines.append(journal_record(by_id[rationale.question_id], rationale))
                attempts.append(rationale)
                of_question.setdefault(rationale.question_id, []).append(rationale)
                if rationale.accepted:
                    accepted.add(rationale.question_id)
                done = is_settled(of_question[rationale.question_id], self.scheme)
                progress.update(int(done), rationale.n_tokens, f"accepted {len(accepted) / len(of_question):.0%}")
        return attempts

    def _gaps(self, attempts: list[Rationale], by_id: dict[str, Question], module: EMModule, iteration: int) -> list[float]:
        """|log π of the engine − log π of the model| a token, nats, of a few of this rank's attempts."""
        drawn = [r for r in attempts if r.token_ids]
        drawn = drawn[:: -(-len(drawn) // GAP_SAMPLE) or 1]
        examples = self.scheme.n_examples(iteration)
        pairs = [(module.prompts.ids(by_id[r.question_id], r.proposal, examples), r.token_ids) for r in drawn]
        scored = completion_logprobs(module.model, pairs)
        return [abs(r.logprob - own) / len(r.token_ids) for r, own in zip(drawn, scored, strict=True)]

    def conditions(self, module: EMModule) -> dict[str, Any]:
        """What the draws of an E-step depend on; a journal drawn under other conditions is not replayed."""
        questions = hashlib.blake2b(digest_size=8)
        for question in self.questions:
            questions.update(
                repr((question.id, question.text, question.choices, question.answer, question.answer_as)).encode("utf-8", "surrogatepass")
            )
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
