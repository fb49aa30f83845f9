"""Faults of one line and the tests that must fail with them; `make faults` plants them one at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (which occurs there once) becomes `new`; one of `tests` must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, f"src/emreason/{file}", old, new, tuple(f"tests/{test}" for test in tests))


FAULTS = [
    fault(
        "masters: a later micro-batch overwrites the gradient",
        "masters.py",
        "master.grad += parameter.grad",
        "master.grad = parameter.grad.float()",
        "test_module.py::test_gradients_of_several_batches_add_up_in_float32",
    ),
    fault(
        "clipping: short gradients are lengthened, long ones pass",
        "module.py",
        "max_grad_norm is not None and norm > self.m_step.max_grad_norm",
        "max_grad_norm is not None and norm < self.m_step.max_grad_norm",
        "test_module.py::test_clipping_shortens_a_long_gradient_and_leaves_a_short_one",
    ),
    fault(
        "clipping: dropped",
        "module.py",
        "torch.nn.utils.clip_grads_with_norm_(parameters, self.m_step.max_grad_norm, norm)",
        "pass",
        "test_module.py::test_clipping_shortens_a_long_gradient_and_leaves_a_short_one",
    ),
    fault(
        "evaluation: all samples of a question share a seed",
        "evaluate.py",
        "draw_seed(seed, -1, q.id, i)",
        "draw_seed(seed, -1, q.id, 0)",
        "test_evaluate.py::test_pass_and_majority_of_scripted_draws",
    ),
    fault(
        "baselines: the few-shot one is taken from the zero-shot one",
        "recorder.py",
        "tuple(questions), n_examples, module.max_new_tokens",
        "tuple(questions), module.max_new_tokens",
        "test_recorder.py::test_baselines_with_and_without_examples_are_two_measurements",
    ),
    fault(
        "baselines: another model's are taken",
        "recorder.py",
        "key = (weights, module.prompts",
        "key = (module.prompts",
        "test_recorder.py::test_baselines_with_and_without_examples_are_two_measurements",
    ),
    fault(
        "resume: m_step may change",
        "experiment.py",
        '    "trainer",\n',
        '    "trainer", "m_step",\n',
        "test_config.py::test_a_resumed_run_may_change_nothing_else",
    ),
    fault(
        "resume: sampler may change",
        "experiment.py",
        '    "trainer",\n',
        '    "trainer", "sampler",\n',
        "test_config.py::test_a_resumed_run_may_change_nothing_else",
    ),
    fault(
        "resume: all of evaluation may change",
        "experiment.py",
        '"evaluation.diagnostics"',
        '"evaluation"',
        "test_config.py::test_a_resumed_run_may_change_nothing_else",
    ),
    fault(
        "steps: no shuffling",
        "datamodule.py",
        "    shuffle.shuffle(slots)\n",
        "",
        "test_datamodule.py::test_every_epoch_and_every_seed_has_an_order_of_its_own",
    ),
    fault(
        "steps: the same order in every epoch",
        "datamodule.py",
        "normalize, shuffle):",
        "normalize, random.Random(seed)):",
        "test_datamodule.py::test_every_epoch_and_every_seed_has_an_order_of_its_own",
    ),
    fault(
        "steps: the same order in every iteration",
        "e_step.py",
        'f"{self.seed}/{iteration}".encode()',
        'f"{self.seed}".encode()',
        "test_e_step.py::test_every_iteration_trains_in_an_order_of_its_own",
    ),
    fault(
        "bootstrap: seeds are not resampled",
        "stats.py",
        "np.full(len(differences), 1 / len(differences)), size=resamples)",
        "np.full(len(differences), 1 / len(differences)), size=resamples) * 0 + 1",
        "test_stats.py::test_bootstrap_resamples_seeds",
    ),
    fault(
        "bootstrap: the 95 % interval is one of 90 %",
        "stats.py",
        "[0.5 - confidence / 2, 0.5 + confidence / 2]",
        "[1 - confidence, confidence]",
        "test_stats.py::test_bootstrap_interval_is_the_95_percent_one_and_p_two_sided",
    ),
    fault(
        "bootstrap: p is one-sided",
        "stats.py",
        "(np.abs(draws - estimate) >= abs(estimate) - 1e-12)",
        "(draws - estimate >= abs(estimate) - 1e-12)",
        "test_stats.py::test_bootstrap_interval_is_the_95_percent_one_and_p_two_sided",
    ),
    fault(
        "importance weights: the proposal without its worked examples",
        "weights.py",
        "a.proposal, examples)",
        "a.proposal)",
        "test_weights.py::test_weights_are_those_of_the_prompts_the_draws_came_from",
    ),
    fault(
        "journal: the questions are no condition",
        "e_step.py",
        '            "questions": questions.hexdigest(),\n',
        "",
        "test_e_step.py::test_a_question_that_was_edited_in_place_is_not_replayed",
    ),
    fault(
        "TRICE: remembers the last iteration alone",
        "e_step.py",
        "memory = remembered(drawn, memory)",
        "memory = remembered(drawn, {})",
        "test_e_step.py::test_trice_remembers_every_earlier_iteration",
    ),
    fault(
        "engine: a chat template's end of turn is no stop",
        "engines/inprocess.py",
        "if mark in str(template)]",
        "if mark not in str(template)]",
        "test_engine.py::test_a_chat_template_s_end_of_turn_ends_a_completion",
    ),
    fault(
        "forced answer: the EOS stays in the prompt",
        "scoring.py",
        "tuple(i for i in completion.token_ids if i not in eos)",
        "tuple(completion.token_ids)",
        "test_scoring.py::test_the_cue_follows_what_was_said_without_its_eos",
    ),
    fault(
        "worked examples: one iteration too long",
        "samplers.py",
        "iteration < self.worked_examples_iterations",
        "iteration <= self.worked_examples_iterations",
        "test_samplers.py::test_worked_examples_are_shown_in_the_first_iterations_alone",
    ),
    fault(
        "report: a failed run with a test score counts",
        "runs.py",
        'if run.status == "finished":',
        'if run.status == "finished" or run.test:',
        "test_report.py::test_what_does_not_count_is_named_and_not_averaged",
    ),
    fault(
        "summary: a repeated iteration is there twice",
        "recorder.py",
        '["iteration"] < iteration]',
        '["iteration"] <= iteration]',
        "test_recorder.py::test_an_iteration_that_is_repeated_replaces_its_record",
    ),
    fault(
        "write_atomic writes in place",
        "journal.py",
        'partial = path.with_name(f".{path.name}.partial")\n    with named(path), partial.open("w"',
        'partial = path\n    with named(path), partial.open("w"',
        "test_journal.py::test_a_file_that_is_replaced_is_never_half_written",
    ),
    fault(
        "engine: one uniform number for all tokens of a draw",
        "engines/inprocess.py",
        "[len(row.drawn) for row in rows]",
        "[0 for row in rows]",
        "test_engine.py::test_every_token_of_every_draw_has_a_number_of_its_own",
    ),
]
