"""The costly diagnostics: faithfulness by a scripted engine, KL per token against enumeration, both through a run and its report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import ScriptedEngine, numbers
from omegaconf import OmegaConf
from rich.console import Console
from test_config import compose_config
from test_module import em_module
from test_weights import plain

from emreason.em.datamodule import RationaleDataModule
from emreason.em.evaluation import Evaluation
from emreason.engines.inprocess import InProcessEngine
from emreason.models.loading import add_lora
from emreason.models.tiny import load_tiny
from emreason.reports.reading import collect
from emreason.reports.writing import print_runs
from emreason.scores.likelihood import completion_logprobs
from emreason.scores.probes import faithful, kl_per_token, log_ratios
from emreason.tracking.divergence import Divergence
from emreason.train import train
from emreason.types import UserError


def rationale(tokenizer, question, text, answer):
    return replace(plain(1, True, question.id), text=text, answer=answer, token_ids=tuple(tokenizer.encode(text, add_special_tokens=False)))


def test_the_answer_is_given_anew_from_the_rationale_alone(prompts, tokenizer):
    questions = numbers(5)
    by_id = {q.id: q for q in questions}
    said = [
        ("11 + 9 = 19.\nAnswer: 20\n", "20"),  # the hint's answer, not the reasoning's
        ("11 + 9 = 20.\nAnswer: 20\n", "20"),
        ("11 + 9 = 20.\nAnswer: 20.0", "20.0"),  # the same number
        ("no answer", None),
    ]
    rationales = [rationale(tokenizer, q, *s) for q, s in zip(questions, said, strict=False)]
    engine = ScriptedEngine(tokenizer, lambda r: " 19\nand more" if "= 19" in tokenizer.decode(r.prompt_ids) else " 20")
    assert sorted(faithful(rationales, by_id, engine, prompts, tokenizer)) == [False, True, True]
    for request in engine.seen:
        shown = str(tokenizer.decode(request.prompt_ids))
        assert shown.startswith(str(tokenizer.decode(prompts.ids(questions[request.key]))))  # the plain prompt
        assert shown.endswith(".\nAnswer:")
        assert "HINT" not in shown
        assert "Answer: 20" not in shown
        assert request.params.temperature == 0
    assert faithful([], by_id, engine, prompts, tokenizer) == []


def perturbed(module, scale=0.02):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.trainable():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def measured(module, questions, divergence):
    module.engine = InProcessEngine(module.model, module.tokenizer)
    module.scores["validation"] = {}
    module.log_dict = lambda *_, **__: None
    divergence.on_validation_epoch_end(trainer_with(questions), module)
    return module.scores["validation"]


def trainer_with(questions):
    class Fake:
        datamodule = RationaleDataModule(questions, [])
        global_rank, world_size, current_epoch = 0, 1, 0

    return Fake()


def test_kl_per_token_against_enumeration():
    """Completions of one token, so that KL = Σᵥ π(v) log π(v)/π₀(v) is a sum over the vocabulary; 600 draws, within 4.5 standard errors."""
    module, n = em_module(), 600
    questions = [replace(numbers(1)[0], id=f"q{i}") for i in range(n)]
    module.evaluation = Evaluation(max_new_tokens=1)
    prompt = module.prompts.ids(questions[0])

    def logits():
        with torch.no_grad():
            return module.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(0)

    divergence = Divergence(n, seed=1)
    divergence.setup(None, module, "fit")
    base = logits()
    same = measured(module, questions, divergence)
    assert same["kl_per_token"] == 0  # unchanged weights: the same pass twice
    perturbed(module, 0.12)
    ours = logits()
    ratio = ours - base
    exactly = float((ours.exp() * ratio).sum())
    deviation = math.sqrt(float((ours.exp() * (ratio - exactly) ** 2).sum()))
    before = [p.detach().clone() for p in module.trainable()]
    values = measured(module, questions, divergence)
    assert values["kl_per_token"] == pytest.approx(exactly, abs=4.5 * deviation / math.sqrt(n))
    assert exactly > 9 * deviation / math.sqrt(n)  # 0 would be noticed, and so would the sign
    # the sample variance of 600 draws: within 4.5 of its own standard errors, (κ − 1)/n under the square root
    kurtosis = float((ours.exp() * (ratio - exactly) ** 4).sum()) / deviation**4
    assert values["kl_per_token_se"] == pytest.approx(deviation / math.sqrt(n), rel=4.5 / 2 * math.sqrt((kurtosis - 1) / n))
    assert all(torch.equal(a, b) for a, b in zip(before, module.trainable(), strict=True))  # the weights are back


def test_longer_draws_are_scored_as_they_were_sampled():
    module = em_module()
    questions = numbers(6)
    engine = InProcessEngine(module.model, module.tokenizer)

    def score(pairs, temperature=1.0):
        return completion_logprobs(module.model, pairs, temperature)

    seen = []

    def nothing(pairs, temperature=1.0):  # noqa: ARG001
        seen.extend(pairs)
        return [0.0] * len(pairs)

    ratios = log_ratios(questions, engine, module.prompts, module.tokenizer, score, nothing, max_new_tokens=12, seed=1)
    assert [length for *_, length in ratios] == [len(ids) for _, ids in seen]
    assert max(length for *_, length in ratios) > 1
    assert {prompt for prompt, _ in seen} == {module.prompts.ids(q) for q in questions}
    total, tokens = sum(v for _, v, _ in ratios), sum(length for *_, length in ratios)
    assert kl_per_token(ratios)["kl_per_token"] == pytest.approx(total / tokens)
    assert kl_per_token([]) == {"kl_per_token": None, "kl_per_token_se": None}
    assert kl_per_token([("a", 1.0, 4)]) == {"kl_per_token": 0.25, "kl_per_token_se": None}


def test_adapters_begin_as_the_base_model():
    module = em_module()
    plain_model = load_tiny("llama")[0]
    module.model = add_lora(module.model, r=4, alpha=8, seed=1)
    divergence = Divergence(6, seed=1)
    divergence.setup(None, module, "fit")
    assert sum(t.numel() for t in divergence._base) < sum(p.numel() for p in plain_model.parameters()) / 2
    perturbed(module)
    pairs = [(module.prompts.ids(q), (5, 6, 7)) for q in numbers(3)]
    with divergence.base_weights(module):
        assert completion_logprobs(module.model, pairs) == pytest.approx(completion_logprobs(plain_model, pairs), abs=1e-5)
    assert measured(module, numbers(6), divergence)["kl_per_token"] != 0


def config(*overrides):
    small = ["dataset.limit.train=30", "dataset.limit.validation=6", "dataset.limit.test=2", "evaluation.baseline=[]"]
    more = ["engine.dtype=float32", "trainer.max_epochs=1", "sampler.max_new_tokens=16", "m_step.on_zero_accepted=skip"]
    cfg = compose_config("experiment=smoke", *small, *more, *overrides)
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def test_they_reach_the_summary_and_the_report_and_survive_a_resume(tmp_path):
    wanted = "evaluation.diagnostics=[kl,faithfulness]"
    train(config(wanted), tmp_path / "run")
    summary = train(config(wanted, "trainer.max_epochs=2"), tmp_path / "run")  # KL is from the base model, not from the checkpoint
    whole = train(config(wanted, "trainer.max_epochs=2"), tmp_path / "whole")
    for one, other in zip(summary["iterations"], whole["iterations"], strict=True):
        assert one["validation"]["kl_per_token"] == pytest.approx(other["validation"]["kl_per_token"], rel=1e-4)
        assert one["validation"]["kl_per_token"] != 0
        assert one["e_step"]["faithful_rate"] == other["e_step"]["faithful_rate"]
        assert 0 <= one["e_step"]["faithful_rate"] <= 1
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert {"validation/kl_per_token", "e_step/faithful_rate"} <= {k for m in metrics for k in m}
    console = Console(width=200, record=True, file=(tmp_path / "shown").open("w"))
    print_runs(collect([tmp_path / "run"]), console)
    shown = console.export_text()
    assert f"{100 * summary['iterations'][-1]['e_step']['faithful_rate']:.1f}" in shown
    assert f"{summary['iterations'][-1]['validation']['kl_per_token']:.3f}".replace("-", "−") in shown


def test_by_default_they_cost_nothing_and_unknown_ones_are_refused(tmp_path):
    summary = train(config(), tmp_path / "plain")
    assert "kl_per_token" not in summary["iterations"][0]["validation"]
    assert "faithful_rate" not in summary["iterations"][0]["e_step"]
    with pytest.raises(UserError, match="kl and faithfulness"):
        train(config("evaluation.diagnostics=[entropy]"), tmp_path / "bad")
