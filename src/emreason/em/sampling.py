"""An E-step's draws on this rank, each in the journal before it counts."""

from __future__ import annotations

from collections.abc import Sequence

from emreason.em.module import EMModule
from emreason.progress import bar
from emreason.runs.journal import Journal, journal_record
from emreason.schemes.samplers import Scheme, is_settled, sample
from emreason.types import Question, Rationale


def draw_journalled(
    mine: Sequence[Question], scheme: Scheme, module: EMModule, journal: Journal, replayed: Sequence[Rationale], seed: int, iteration: int
) -> list[Rationale]:
    """All attempts at this rank's questions: those of `replayed`, then new ones."""
    by_id = {question.id: question for question in mine}
    attempts = [r for r in replayed if r.question_id in by_id]
    of_question: dict[str, list[Rationale]] = {}
    for rationale in attempts:
        of_question.setdefault(rationale.question_id, []).append(rationale)
    accepted = {r.question_id for r in attempts if r.accepted}
    settled = sum(is_settled(group, scheme) for group in of_question.values())
    trainer = module.trainer
    with (
        journal.appending(iteration, trainer.global_rank, trainer.world_size) as lines,
        bar(f"E-step {iteration}", len(mine), "questions", enabled=trainer.is_global_zero) as progress,
    ):
        progress.update(settled, 0, "resumed" if settled else "")
        parts = (module.engine, module.prompts, module.tokenizer)
        for rationale in sample(mine, scheme, *parts, seed=seed, iteration=iteration, replayed=attempts):
            lines.append(journal_record(by_id[rationale.question_id], rationale))
            attempts.append(rationale)
            of_question.setdefault(rationale.question_id, []).append(rationale)
            if rationale.accepted:
                accepted.add(rationale.question_id)
            done = is_settled(of_question[rationale.question_id], scheme)
            progress.update(int(done), rationale.n_tokens, f"accepted {len(accepted) / len(of_question):.0%}")
    return attempts
