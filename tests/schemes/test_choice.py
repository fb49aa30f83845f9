"""Which questions an E-step samples: AdaSTaR's queue by hand, and its way through E-steps, kills and ranks."""

from __future__ import annotations

import json

import pytest
from conftest import ScriptedEngine, numbers
from test_module import em_module, gold_script, trainer
from test_probes import config
from test_samplers import scheme
from test_train import assert_same, learned
from test_weights import plain

from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.runs.journal import Journal
from emreason.schemes.choice import choose
from emreason.train import train
from emreason.types import UserError


def half(name="star", **more):
    return scheme(name, 1, **{"choose": "adaptive", "share": 0.5, **more})


def outcomes(iteration, **right):
    """Attempts of each question: `11` right at once, `01` wrong, then right with the hint, `00` wrong twice."""
    found = []
    for question, how in right.items():
        for n, hit in enumerate(how, start=1):
            found.append(plain(n, hit == "1", question, iteration))
    return found


def ids(past, n=8, seed=1, **more):
    return [q.id for q in choose(numbers(n), half(**more), past, seed)]


def test_all_is_all():
    assert choose(numbers(5), scheme("star"), [], 1) == numbers(5)


def test_without_a_past_the_seed_alone_decides():
    assert len(ids([])) == 4
    assert ids([]) == ids([]) == sorted(ids([]))  # in the questions' own order
    assert len({tuple(ids([], seed=s)) for s in range(20)}) > 10
    assert len(ids([], share=0.01)) == 1  # never none


def test_a_strong_model_goes_on_to_questions_not_seen_yet():
    first = ids([])
    past = [outcomes(0, **dict.fromkeys(first, "1"))]  # α = 1: all four move back
    assert set(ids(past)) == {q.id for q in numbers(8)} - set(first)
    second = ids(past)
    # third iteration: everything seen once, the first four longest ago
    assert ids([*past, outcomes(1, **dict.fromkeys(second, "1"))]) == first


def test_a_weak_model_sees_most_of_them_again():
    first = ids([])
    past = [outcomes(0, **dict.fromkeys(first, "00"))]  # α = 0: ⌊4 · 0⌋ move
    assert ids(past) == first
    once = [outcomes(0, **dict.fromkeys(first, "00") | {first[0]: "1", first[1]: "01"})]  # α = 1/2: ⌊4 / 4⌋ = 1 moves
    assert len(set(ids(once)) & set(first)) == 3


def test_of_those_sampled_at_the_same_time_the_hard_ones_come_first():
    everyone = [q.id for q in numbers(4)]
    # share 1: all four are sampled and, all solved, all move: win rates 1, 1/2, 1, 1/2
    past = [outcomes(0, **dict(zip(everyone, ("1", "01", "1", "01"), strict=True)))]
    standing = ids(past, n=4, share=0.5)
    assert standing != [everyone[1], everyone[3]]  # share 0.5 had sampled two only, the others are unseen
    assert ids(past, n=4, share=1.0) == everyone
    # two rounds at 0.5 make all seen: the second pair's round is later, within the first the harder one leads
    first = ids([], n=4)
    rest = [q for q in everyone if q not in first]
    two = [outcomes(0, **{first[0]: "1", first[1]: "01"}), outcomes(1, **dict.fromkeys(rest, "1"))]
    assert ids(two, n=4, share=0.5) == first
    # of eight, four at a time: all four of the first round move back, of the second's only ⌊3² / 4⌋; two of the four are left over
    first = ids([])
    rest = [q.id for q in numbers(8) if q.id not in first]
    hard = outcomes(0, **dict(zip(first, ("1", "01", "1", "01"), strict=True)))
    third = ids([hard, outcomes(1, **dict(zip(rest, ("1", "1", "1", "00"), strict=True)))])
    assert set(third) & set(first) == {first[1], first[3]}


def test_iterations_sample_and_train_on_the_chosen_ones_and_a_resumed_run_agrees(tmp_path):
    questions = numbers(8)

    def run(folder, epochs):
        module = em_module()
        module.engine = ScriptedEngine(module.tokenizer, gold_script(questions, lambda r: r.key[1] == 2 or r.key[0] < "q005"))
        callback = EStep(half(), questions, Journal(folder), seed=1)
        trainer(folder, [callback], epochs).fit(module, RationaleDataModule([], []))
        return callback

    callback = run(tmp_path / "whole", 3)
    drawn = [Journal(tmp_path / "whole").read(i) for i in range(3)]
    for iteration in range(3):
        chosen = choose(questions, half(), drawn[:iteration], 1)
        assert {r.question_id for r in drawn[iteration]} == {q.id for q in chosen}
    assert callback.record["questions"] == callback.record["accepted"] == 4
    assert {q for s in callback._steps[1] for b in s.batches for q in b.question_ids} == {r.question_id for r in drawn[2]}
    assert {r.question_id for r in drawn[0]}.isdisjoint(r.question_id for r in drawn[1])


@pytest.mark.parametrize(
    "overrides",
    [["trice"], ["adastar"], ["star_mh", "sampler.proposals.rationalization=12"], ["rloo", "sampler.budget=4"]],
    ids=lambda o: o[0],
)
def test_schemes_that_need_the_past_resume_from_the_journals(tmp_path, overrides):
    """Extended after its first iteration, then killed in the second one's E-step, whose first lines carry no weights yet."""
    name, *more = overrides
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = [f"sampler={name}", "sampler.budget=1", *more]
    train(config(*arguments, "trainer.max_epochs=3"), whole)
    train(config(*arguments, "trainer.max_epochs=1"), resumed)
    for path in (whole / "rationales").glob("iteration=001*"):
        text = path.read_text()
        if path.suffix == ".jsonl":
            drawn = [json.loads(line) for line in text.splitlines()[:5]]
            text = "".join(json.dumps({**line, "weight": 1.0, "log_weight": None}) + "\n" for line in drawn)
        (resumed / "rationales" / path.name).write_text(text)
    train(config(*arguments, "trainer.max_epochs=3"), resumed)
    one, other = learned(resumed), learned(whole)
    assert_same(one, other)
    assert any(r["weight"] < 0 for r in one[1]) == (name in ("trice", "rloo"))
    assert any(r["log_weight"] is not None for r in one[1]) == (name == "star_mh")


def test_adaptive_choice_does_not_go_with_trice():
    with pytest.raises(UserError, match="choose=adaptive"):
        half(keep=2, weigh="trice")
