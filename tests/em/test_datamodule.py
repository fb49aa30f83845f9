"""From rationales to batches: masks, shards, token budgets, normalisation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import letters, numbers
from hypothesis import given
from hypothesis import strategies as st

from emreason.em.datamodule import RationaleDataModule
from emreason.em.m_step import MStep
from emreason.em.steps import make_steps
from emreason.models.batches import Example, bucket, collate

PAD = 2  # also EOS, on purpose


def example(i: int, prompt: int = 4, completion: int = 3) -> Example:
    return Example(f"q{i:03d}", tuple(range(10, 10 + prompt)), (*range(50, 50 + completion - 1), PAD))


def test_prompt_is_masked_and_eos_is_not_although_it_is_the_pad_token():
    batch = collate([example(0), example(1, prompt=2, completion=2)], [1.0, 1.0], PAD)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 50, 51, PAD], [10, 11, 50, PAD, PAD, PAD, PAD]]
    assert batch.completion_mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]]
    assert batch.marks.rows.tolist() == [0, 0, 0, 1, 1]


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40), budget=st.integers(1, 300))
def test_buckets_hold_everything_within_the_budget(lengths, budget):
    examples = sorted((example(i, length - 1, 1) for i, length in enumerate(lengths)), key=len)
    buckets = bucket(examples, budget)
    assert [e for b in buckets for e in b] == examples
    assert all(len(b) == 1 or len(b) * max(map(len, b)) <= budget for b in buckets)


def steps(n, accepted, normalize, world=1, rank=0, batch_size=4, epochs=1):
    return make_steps(
        [example(i, completion=2 + i % 5) for i in range(accepted)],
        n,
        MStep(epochs=epochs, batch_size=batch_size, tokens_per_batch=20, normalize=normalize),
        pad_id=PAD,
        seed=3,
        rank=rank,
        world_size=world,
    )


@given(
    n=st.integers(1, 30),
    share=st.floats(0, 1),
    world=st.integers(1, 4),
    normalize=st.sampled_from(["questions", "rationales", "tokens"]),
    epochs=st.integers(1, 3),
)
def test_ranks_together_train_on_every_rationale_once_per_epoch(n, share, world, normalize, epochs):
    accepted = round(share * n)
    alone = steps(n, accepted, normalize, epochs=epochs)
    ranks = [steps(n, accepted, normalize, world, rank, epochs=epochs) for rank in range(world)]
    assert {len(r) for r in ranks} == {len(alone)}  # equally many steps on every rank, or some would hang
    for i, step in enumerate(alone):
        together = sorted(q for r in ranks for b in r[i].batches for q in b.question_ids)
        assert together == sorted(q for b in step.batches for q in b.question_ids)
    trained = sorted(q for s in alone for b in s.batches for q in b.question_ids)
    assert trained == sorted(epochs * [f"q{i:03d}" for i in range(accepted)])


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    def order(seed):
        settings = MStep(epochs=2, batch_size=1, tokens_per_batch=20, normalize="rationales")
        made = make_steps([example(i) for i in range(12)], 12, settings, pad_id=PAD, seed=seed)
        ids = [q for s in made for b in s.batches for q in b.question_ids]
        return ids[:12], ids[12:]

    first, second = order(3)
    assert len({tuple(ids) for ids in (first, second, sorted(first), *order(4))}) == 5
    assert order(3) == (first, second)


def test_each_rank_evaluates_its_share_of_the_split_that_is_asked_for():
    data = RationaleDataModule(numbers(5), letters(4))
    shares = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares += [*data.val_dataloader(), *data.test_dataloader()]
    validation, test = numbers(5), letters(4)
    assert shares == [validation[::2], test[::2], validation[1::2], test[1::2]]


def total_weight(steps):
    return sum(float(b.weights.sum()) for s in steps for b in s.batches)


def test_normalisation():
    # questions: the update is proportional to the acceptance rate, as in the paper's sum over all questions
    assert total_weight(steps(16, 16, "questions")) == pytest.approx(4.0)
    assert total_weight(steps(16, 4, "questions")) == pytest.approx(1.0)
    # rationales: every step is a mean, whatever was accepted
    assert total_weight(steps(16, 16, "rationales")) == pytest.approx(4.0)
    assert total_weight(steps(16, 4, "rationales")) == pytest.approx(1.0)
    assert [total_weight([s]) for s in steps(16, 6, "rationales")] == pytest.approx([1.0, 1.0])
    # tokens: weights times lengths make a mean over tokens
    for step in steps(8, 8, "tokens"):
        assert sum(float(b.weights[b.marks.rows].sum()) for b in step.batches) == pytest.approx(1.0)


def test_questions_normalisation_leaves_no_step_out_of_the_count():
    """With few accepted, a step of B questions holds fewer than B rationales, each still divided by B."""
    for step in steps(64, 3, "questions", batch_size=16):
        for batch in step.batches:
            assert torch.allclose(batch.weights, torch.full_like(batch.weights, 1 / 16))
