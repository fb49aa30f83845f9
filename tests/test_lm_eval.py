"""`emreason-eval method=loglikelihood` against lm-evaluation-harness: the same exported model, questions and answers."""

from __future__ import annotations

import json
import string

import pytest
import torch
from conftest import letters

from emreason.evaluate import continuation_logprobs, letter_logprobs
from emreason.models.tiny import load_tiny
from emreason.questions.prompts import Prompts, PromptTemplate
from emreason.runs.experiment import Experiment
from emreason.scores.scoring import token_logprobs


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 3, 2)])
def test_continuations_are_scored_as_one_by_one(tiny, lengths):
    model = tiny[0].eval()
    prompt = [5, 9, 33, 60, 12]
    continuations = [list(range(20 + 7 * i, 20 + 7 * i + n)) for i, n in enumerate(lengths)]
    with torch.no_grad():
        scored = continuation_logprobs(model, prompt, continuations)
        for score, continuation in zip(scored, continuations, strict=True):
            ids = torch.tensor([[*prompt, *continuation]])
            mask = torch.arange(ids.shape[1])[None] >= len(prompt)
            assert float(score) == pytest.approx(float(token_logprobs(model, ids, mask).sum()), abs=1e-4)


def test_single_tokens_cost_one_forward_pass_of_the_prompt(tiny):
    model = tiny[0].eval()
    seen = []
    model.register_forward_pre_hook(lambda *_, **__: seen.append(1), with_kwargs=True)
    with torch.no_grad():
        continuation_logprobs(model, [5, 9, 33], [[20], [21], [22], [23]])
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize("single", [True, False])
def test_the_answers_are_those_of_lm_evaluation_harness(tmp_path, single):
    """`single`: every letter is one token, as in real vocabularies; otherwise the space before it is a token of its own."""
    pytest.importorskip("lm_eval", reason="needs pip install lm-eval, in an environment of its own")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer = load_tiny("llama", seed=3)
    if single:
        tokenizer.add_tokens([f" {letter}" for letter in string.ascii_uppercase[:5]])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 8  # as initialised, its answer hardly depends on the question
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    questions = [*letters(24, 4), *(q for q in letters(40, 5) if int(q.id[1:]) >= 24)]
    prompts = Prompts(tokenizer, PromptTemplate(instruction="Think.", hint="{answer}", system=""), ())
    experiment = Experiment(None, prompts, model, tokenizer, None, torch.float32)  # type: ignore[arg-type]
    ours = letter_logprobs(experiment, questions)

    rows = [{"prompt": prompts.text(q) + "Answer:", "letters": list(q.letters), "gold": q.letters.index(q.answer)} for q in questions]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(
        f"""task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: letters
doc_to_target: gold
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
    )
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["letters"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(theirs["samples"]["letters"], key=lambda sample: sample["doc_id"])
    chosen = [max(range(len(s["filtered_resps"])), key=lambda i, s=s: float(s["filtered_resps"][i][0])) for s in samples]
    assert [q.letters[i] for q, i in zip(questions, chosen, strict=True)] == ours
    accuracy = sum(a == q.answer for a, q in zip(ours, questions, strict=True)) / len(questions)
    assert theirs["results"]["letters"]["acc,none"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1
    assert len(set(ours)) > 1  # no constant answer, which would agree by luck
