"""The loop against the algorithm on one page: the same draws, weights and parameters after two iterations."""

from __future__ import annotations

import pytest
import torch
from conftest import letters
from test_module import em_module, trainer
from test_samplers import scheme

from emreason.em import reference
from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.m_step import MStep
from emreason.engines.inprocess import InProcessEngine
from emreason.runs.journal import Journal
from emreason.types import SamplingParams

SCHEMES = {
    "rs": (reference.REJECTION_SAMPLING_4, scheme("rs", 4, max_new_tokens=24)),
    "star": (reference.STAR, scheme("star", max_new_tokens=24)),
    "pps": (reference.PROMPT_POSTERIOR_SAMPLING, scheme("pps", max_new_tokens=24)),
}
LR = 0.1


@pytest.mark.parametrize("name", SCHEMES)
def test_the_loop_does_what_the_page_says(tmp_path, name):
    proposals, scheme_ = SCHEMES[name]
    questions = letters(32)
    page = em_module()
    before = [p.detach().clone() for p in page.trainable()]
    history = reference.learn(page.model.eval(), page.prompts, questions, proposals, SamplingParams(max_new_tokens=24), n=2, lr=LR, seed=1)

    loop = em_module(lr=LR, m_step=MStep(batch_size=len(questions), max_grad_norm=None))
    loop.engine = InProcessEngine(loop.model, loop.tokenizer)
    trainer(tmp_path, [EStep(scheme_, questions, Journal(tmp_path), seed=1)]).fit(loop, RationaleDataModule([], []))

    eos = loop.tokenizer.eos_token_id
    for iteration, draws in enumerate(history):
        drawn = Journal(tmp_path).read(iteration)
        ids = [r.token_ids + ((eos,) if r.finish_reason == "answer" else ()) for r in drawn]  # the page ends what ends with its answer
        theirs = [(r.question_id, r.proposal, i, r.weight) for r, i in zip(drawn, ids, strict=True)]
        assert [(d.question.id, d.proposal, d.ids, float(d.reward)) for d in draws] == theirs
    rewards = [d.reward for draws in history for d in draws]
    assert 0 < sum(rewards) < len(rewards)
    for ours, theirs, start in zip(loop.trainable(), page.trainable(), before, strict=True):
        moved = theirs - start
        assert moved.abs().max() > 5e-5
        torch.testing.assert_close(ours - start, moved, rtol=1e-3, atol=1e-7)
