"""The M-step: what is learned from, gradients, precision, modes; the pull between Lightning and the E-step."""

from __future__ import annotations

import functools
import itertools

import lightning as L
import pytest
import torch
from conftest import TEMPLATE, ScriptedEngine, numbers
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_samplers import RIGHT, WRONG, scheme

from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.m_step import MStep
from emreason.em.module import EMModule
from emreason.em.steps import make_steps
from emreason.models.batches import Example, Step, collate, shared_prefix
from emreason.models.loading import add_lora
from emreason.models.masters import master_weights
from emreason.models.tiny import load_tiny
from emreason.questions.prompts import Prompts
from emreason.runs.journal import Journal
from emreason.schemes.samplers import training_ids
from emreason.scores import scoring
from emreason.scores.scoring import token_logprobs
from emreason.types import Demonstration, UserError


def em_module(engine=None, m_step=None, lr=1e-2, dtype=torch.float32, family="llama"):
    model, tokenizer = load_tiny(family, dtype=dtype)
    optimizer = functools.partial(torch.optim.SGD, lr=lr)
    return EMModule(model, tokenizer, engine, Prompts(tokenizer, TEMPLATE, ()), optimizer, m_step or MStep(max_grad_norm=None))


def trainer(tmp_path, callbacks=(), epochs=2, **more):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        inference_mode=False,
        limit_val_batches=0,
        **more,
    )


def gold_script(questions, right=lambda _: True):
    gold = {q.id: q.answer for q in questions}
    return lambda request: RIGHT.format(gold[request.key[0]]) if right(request) else WRONG


def fit(tmp_path, questions, script, m_step=None, epochs=2, scheme_=None, module=None):
    module = module or em_module(m_step=m_step)
    module.engine = ScriptedEngine(module.tokenizer, script)
    e_step = EStep(scheme_ or scheme("rs"), questions, Journal(tmp_path), seed=1)
    data = RationaleDataModule([], [])
    trainer(tmp_path, [e_step], epochs).fit(module, data)
    return module, e_step


# ---- what is learned from ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["star", "pps"])
def test_the_hint_is_in_no_training_input(tmp_path, name):
    questions = numbers(12)
    module = em_module()
    sentinel = tuple(module.tokenizer.encode("HINT", add_special_tokens=False))
    seen: list[torch.Tensor] = []
    original = module.training_step

    def spy(step: Step, batch_idx: int) -> None:
        seen.extend(row for b in step.batches for row in b.input_ids)
        original(step, batch_idx)

    module.training_step = spy
    script = gold_script(questions, lambda request: "HINT" in module.tokenizer.decode(request.prompt_ids))
    module, e_step = fit(tmp_path, questions, script, scheme_=scheme(name), module=module)
    assert e_step.record["accepted"] == 12  # all of them through the hinted prompt
    assert len(seen) == 2 * 12
    for row in seen:
        ids = row.tolist()
        assert not any(tuple(ids[i : i + len(sentinel)]) == sentinel for i in range(len(ids)))


def test_training_input_is_the_plain_prompt_and_exactly_the_sampled_ids(tmp_path):
    """Zero-shot, whatever the E-step's prompts showed."""
    questions, module = numbers(6), em_module()
    module.prompts = Prompts(module.tokenizer, TEMPLATE, [Demonstration(numbers(7)[-1], "so")])
    gold = gold_script(questions)
    script = lambda r: (gold(r), "answer" if r.key[0] < "q003" else "stop")  # noqa: E731
    module, e_step = fit(tmp_path, questions, script, epochs=1, scheme_=scheme("pps", worked_examples=1), module=module)
    by_id = {q.id: q for q in questions}
    rationales = {r.question_id: r for r in Journal(tmp_path).read(0)}
    steps = e_step._steps[1]
    for batch in (b for s in steps for b in s.batches):
        for row, question_id in enumerate(batch.question_ids):
            prompt = module.prompts.ids(by_id[question_id])
            sampled = training_ids(rationales[question_id], module.tokenizer.eos_token_id)
            n = int(batch.completion_mask[row].nonzero().max()) + 1
            assert batch.input_ids[row, :n].tolist() == [*prompt, *sampled]
            assert batch.input_ids[row][batch.completion_mask[row]].tolist() == list(sampled)
            assert sampled[-1] == module.tokenizer.eos_token_id


def test_text_is_not_tokenised_again(tmp_path):
    """A model may sample ids that its own tokenizer would never make of the same text; those ids are what counts."""
    questions = numbers(1)
    module = em_module()
    odd = [*module.tokenizer.encode("x", add_special_tokens=False), *(module.tokenizer.convert_tokens_to_ids(c) for c in "\nAnswer: 0")]
    assert list(module.tokenizer.encode("x\nAnswer: 0\n", add_special_tokens=False)) != odd

    class OddEngine(ScriptedEngine):
        def generate(self, requests):
            for completion in super().generate(requests):
                yield type(completion)(completion.request, (*odd, self.tokenizer.eos_token_id), -1.0, "stop")

    module.engine = OddEngine(module.tokenizer, lambda _: "")
    e_step = EStep(scheme("rs"), questions, Journal(tmp_path), seed=1)
    trainer(tmp_path, [e_step], 1).fit(module, RationaleDataModule([], []))
    (batch,) = e_step._steps[1][0].batches
    assert batch.input_ids[0][batch.completion_mask[0]].tolist() == [*odd, module.tokenizer.eos_token_id]


# ---- the pull -------------------------------------------------------------------------------------------------------------------------


def test_every_iteration_trains_on_its_own_rationales(tmp_path):
    """A dataset filled in `on_train_epoch_start` would be trained one epoch late."""
    questions = numbers(6)
    trained: list[set[str]] = []
    module = em_module()
    original = module.training_step

    def spy(step, batch_idx):
        trained.append({q for b in step.batches for q in b.question_ids})
        original(step, batch_idx)

    module.training_step = spy
    gold = {q.id: q.answer for q in questions}

    def script(request):  # in iteration k only question k is answered correctly
        return RIGHT.format(gold[request.key[0]]) if request.key[0] == f"q{len(trained):03d}" else WRONG

    fit(tmp_path, questions, script, epochs=4, module=module)
    assert trained == [{"q000"}, {"q001"}, {"q002"}, {"q003"}]


def test_sampling_is_in_eval_mode_and_training_in_train_mode(tmp_path):
    questions = numbers(4)
    modes: list[tuple[str, bool]] = []
    module = em_module()
    original = module.training_step

    def spy(step, batch_idx):
        modes.append(("train", all(m.training for m in module.model.modules())))
        original(step, batch_idx)

    module.training_step = spy
    module.model.eval()  # as from_pretrained leaves it
    fit(tmp_path, questions, gold_script(questions), module=module)
    assert modes
    assert all(training for _, training in modes)


def test_zero_accepted_is_an_error_or_a_skipped_iteration(tmp_path):
    questions = numbers(3)
    with pytest.raises(UserError, match="none of 3 questions"):
        fit(tmp_path / "a", questions, lambda _: WRONG)
    module = em_module(m_step=MStep(on_zero_accepted="skip"))
    before = [p.clone() for p in module.trainable()]
    gold = gold_script(questions)
    calls = []

    def script(request):
        calls.append(request.key)
        return WRONG if len(calls) <= 3 else gold(request)

    module, e_step = fit(tmp_path / "b", questions, script, epochs=2, module=module)
    assert e_step.record["accepted"] == 3  # the second iteration came, and learned
    assert any(not torch.equal(a, b) for a, b in zip(before, module.trainable(), strict=True))


# ---- the update -----------------------------------------------------------------------------------------------------------------------


def examples(module, n=5):
    tokenizer = module.tokenizer
    rows = []
    for i, question in enumerate(numbers(n)):
        completion = (*tokenizer.encode("so " * (i + 1) + f"\nAnswer: {question.answer}", add_special_tokens=False), tokenizer.eos_token_id)
        rows.append(Example(question.id, module.prompts.ids(question), completion))
    return rows


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_token_logprobs_equal_the_library_s_loss(family):
    module = em_module(family=family)
    rows = examples(module)
    batch = collate(rows, [1.0] * len(rows), module.tokenizer.pad_token_id)
    ours = token_logprobs(module.model, batch.input_ids, batch.completion_mask)
    chunked = token_logprobs(module.model, batch.input_ids, batch.completion_mask, chunk=7)
    assert torch.allclose(ours, chunked, atol=1e-6)
    start = 0
    for row in rows:  # one at a time, unpadded, with the library's own labels
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        labels = ids.clone()
        labels[0, : len(row.prompt_ids)] = -100
        expected = module.model(input_ids=ids, labels=labels).loss
        n = len(row.completion_ids)
        assert -ours[start : start + n].mean().item() == pytest.approx(expected.item(), abs=1e-5)
        start += n


@pytest.mark.parametrize("family", ["llama", "qwen2", "lora"])
def test_neither_packing_nor_a_shared_prefix_changes_log_probabilities_or_gradients(family, monkeypatch):
    """Against the model's own forward on padded rows."""
    module = em_module(family="llama" if family == "lora" else family)
    if family == "lora":
        module.model = add_lora(module.model, r=4, alpha=8)
        for parameter in module.trainable():  # B starts at zero
            torch.nn.init.normal_(parameter, std=0.1)
    rows = examples(module)
    rows += [Example(r.question_id, r.prompt_ids, r.completion_ids[:2] + other.completion_ids) for r, other in itertools.pairwise(rows)]
    batch = collate(rows, [1.0] * len(rows), module.tokenizer.pad_token_id)
    shared = shared_prefix(batch.input_ids, batch.completion_mask)
    assert 4 < shared < min(len(row.prompt_ids) for row in rows)
    results = []
    own = (lambda _: False, 10**9)
    ways = [own, (scoring.can_pack_rows, 1), (scoring.can_pack_rows, 10**9), (own[0], 1)]
    assert scoring.can_pack_rows(scoring.base_causal_lm(module.model))
    for can_pack_rows, least in ways:
        monkeypatch.setattr(scoring, "can_pack_rows", can_pack_rows)
        monkeypatch.setattr(scoring, "MIN_SHARED", least)
        logprobs = token_logprobs(module.model, batch.input_ids, batch.completion_mask)
        gradients = torch.autograd.grad(logprobs.square().sum(), module.trainable())
        results.append((logprobs, torch.cat([g.flatten() for g in gradients])))
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    module.model.train()
    monkeypatch.setattr(scoring, "can_pack_rows", ways[1][0])
    logprobs = token_logprobs(module.model, batch.input_ids, batch.completion_mask)
    gradients = torch.autograd.grad(logprobs.square().sum(), module.trainable())
    results.append((logprobs, torch.cat([g.flatten() for g in gradients])))
    for logprobs, gradient in results[1:]:
        assert torch.allclose(logprobs, results[0][0], atol=1e-5)
        assert torch.allclose(gradient, results[0][1], rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize(
    ("rows", "prompt", "expected"),
    [
        ([[1, 2, 3, 9], [1, 2, 4, 9]], 3, 2),
        ([[1, 2, 3, 9], [1, 2, 3, 8]], 3, 2),
        ([[1, 2, 3, 9]], 3, 0),
        ([[1, 2, 9, 9], [5, 2, 9, 9]], 2, 0),
    ],
)
def test_a_shared_prefix_ends_before_the_last_prompt_token(rows, prompt, expected):
    """The state of the last prompt token predicts the first completion token, so each row needs its own."""
    mask = torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
    mask[:, prompt:] = True
    assert shared_prefix(torch.tensor(rows), mask) == expected


def gradient_of(module, steps):
    data = RationaleDataModule([], [])
    data.pull = lambda: steps
    before = [p.detach().clone() for p in module.trainable()]
    trainer(".", epochs=1).fit(module, data)
    return torch.cat([(a - b.detach()).flatten() for a, b in zip(before, module.trainable(), strict=True)])


@pytest.mark.parametrize("tokens", [10, 80, 10_000])
def test_the_update_is_the_filtered_gradient_however_it_is_batched(tokens):
    """SGD with lr 1 moves by exactly Σᵢ ∇ -log π(zᵢ, yᵢ | xᵢ) / B."""
    module = em_module(lr=1.0)
    rows = examples(module, 5)
    loss = 0
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        labels = ids.clone()
        labels[0, : len(row.prompt_ids)] = -100
        loss = loss + module.model(input_ids=ids, labels=labels).loss * len(row.completion_ids)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss / 8, module.trainable())])
    steps = make_steps(rows, 8, MStep(batch_size=8, tokens_per_batch=tokens), pad_id=module.tokenizer.pad_token_id, seed=0)
    moved = gradient_of(module, steps)
    assert torch.allclose(moved, expected, atol=2e-6)


def test_every_step_has_a_gradient_of_its_own():
    """At a small learning rate two equal steps move twice as far as one."""

    def moved(n):
        module = em_module(lr=1e-5)
        return gradient_of(module, n * [Step([collate(examples(module), [1.0] * 5, module.tokenizer.pad_token_id)])])

    assert (moved(2) - 2 * moved(1)).norm() < 0.05 * moved(1).norm()


def test_the_record_of_an_m_step_is_per_supervised_token(tmp_path):
    questions = numbers(6)
    module, e_step = fit(
        tmp_path, questions, gold_script(questions), epochs=1, module=em_module(lr=0.0, m_step=MStep(batch_size=2, epochs=3))
    )
    record = module.finish_m_step()
    batches = [b for s in e_step._steps[1] for b in s.batches]
    with torch.no_grad():
        logprobs = torch.cat([token_logprobs(module.model, b.input_ids, b.completion_mask) for b in batches])
    assert (record["steps"], record["tokens"]) == (9, len(logprobs))
    assert record["nll"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)


def test_master_weights_keep_updates_that_bf16_would_lose():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    (master,) = master_weights([parameter])
    optimizer = torch.optim.SGD([master], lr=1e-4)
    for _ in range(100):
        parameter.sum().backward()
        assert parameter.grad is None  # moved to the fp32 twin
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            parameter.copy_(master)
    assert parameter.tolist() == pytest.approx([0.99] * 4, abs=2**-8)
    assert float(torch.tensor(1.0, dtype=torch.bfloat16) - 1e-4) == 1.0  # what would have happened without


def test_gradients_of_several_batches_add_up_in_float32():
    """257 is no bfloat16: added there, the later batch would vanish."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    (master,) = master_weights([parameter])
    for factor in (256, 1):
        (parameter * factor).sum().backward()
    assert master.grad.tolist() == [257.0]


@pytest.mark.parametrize("share", [0.25, 0.999, 1.001, 4.0])
def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one(share):
    """SGD with lr 1 moves by the gradient, or in its direction by `max_grad_norm`."""
    rows = examples(em_module(), 5)

    def moved(max_grad_norm):
        module = em_module(lr=1.0, m_step=MStep(max_grad_norm=max_grad_norm))
        return gradient_of(module, [Step([collate(rows, [1.0] * 5, module.tokenizer.pad_token_id)])])

    whole = moved(None)
    assert torch.allclose(moved(share * whole.norm().item()), min(share, 1.0) * whole, rtol=1e-3, atol=1e-4)


def test_bf16_training_follows_fp32(tmp_path):
    questions = numbers(8)
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        module = em_module(dtype=dtype, lr=0.1)
        before = [p.detach().float().clone() for p in module.trainable()]
        fit(tmp_path / str(dtype), questions, gold_script(questions), module=module, epochs=3)
        moved.append(torch.cat([(a.detach().float() - b).flatten() for a, b in zip(module.trainable(), before, strict=True)]))
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_init_base_starts_every_m_step_from_the_base_weights(tmp_path, dtype):
    questions = numbers(8)
    module = em_module(m_step=MStep(init="base", batch_size=4), lr=0.1, dtype=dtype)
    base = [p.detach().clone() for p in module.trainable()]
    original, from_base = module.training_step, []

    def spy(step, batch_idx):
        starts = [module.trainable(), *([module._masters] if module._masters else [])]
        from_base.append(all(torch.equal(b.to(p.dtype), p) for ps in starts for b, p in zip(base, ps, strict=True)))
        original(step, batch_idx)

    module.training_step = spy
    fit(tmp_path, questions, gold_script(questions), module=module, epochs=2)
    assert from_base == [True, False] * 2


def test_an_iteration_that_is_skipped_leaves_the_model_as_it_is(tmp_path):
    questions = numbers(8)
    module = em_module(m_step=MStep(init="base", batch_size=4, on_zero_accepted="skip"), lr=0.1)
    before = [p.detach().clone() for p in module.trainable()]
    fit(tmp_path, questions, gold_script(questions, lambda _: module.current_epoch == 0), module=module, epochs=2)
    assert not any(torch.equal(b, p) for b, p in zip(before, module.trainable(), strict=True))


@pytest.mark.parametrize(
    ("m_step", "expected"),
    [
        (MStep(batch_size=2), [1, 1, 1, 1] * 2),
        (MStep(batch_size=2, decay=True), [1, 0.75, 0.5, 0.25] * 2),
        (MStep(batch_size=2, warmup_steps=3), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (MStep(batch_size=2, warmup_steps=3, optimizer="reset"), [0.25, 0.5, 0.75, 1] * 2),
    ],
)
def test_the_learning_rate_over_two_iterations(tmp_path, m_step, expected):
    questions = numbers(8)
    rates: list[float] = []
    moments: list[bool] = []
    module = em_module(m_step=m_step, lr=1e-3)

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"] / 1e-3))
        optimizer.register_step_pre_hook(lambda o, *_: moments.append(bool(o.state)))
        return optimizer

    module.make_optimizer = make
    fit(tmp_path, questions, gold_script(questions), module=module, epochs=2)
    assert rates == pytest.approx(expected)
    assert moments == [False, True, True, True, m_step.optimizer == "carry", True, True, True]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    questions = numbers(4)
    module = em_module()
    with torch.no_grad():
        module.model.model.norm.weight[0] = float("nan")
    before = [p.detach().clone() for p in module.trainable()]
    with pytest.raises(UserError, match=r"^The loss of optimizer step 0 .*q00"):
        fit(tmp_path, questions, gold_script(questions), module=module)
    assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(before, module.trainable(), strict=True))


def test_the_test_after_the_fit_needs_neither_moments_nor_masters(tmp_path):
    """Lightning would copy the moments to the host and leave the masters where they are."""
    questions = numbers(4)
    module = em_module(dtype=torch.bfloat16)
    module.make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    states, teardown = [], SingleDeviceStrategy.teardown

    def spy(strategy):
        states.extend(len(optimizer.state) for optimizer in strategy.optimizers)
        teardown(strategy)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SingleDeviceStrategy, "teardown", spy)
        fit(tmp_path, questions, gold_script(questions), module=module)
    assert states == [0]
    assert module._masters
    assert not sum(master.numel() for master in module._masters)
    assert module._restored_masters is None
