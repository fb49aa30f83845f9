"""Nothing is silent for long: slow draws, slow optimizer steps and slow loading say that they go on."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter, deque

import pytest
from conftest import ScriptedEngine, numbers
from test_config import compose_config
from test_module import em_module, gold_script, trainer
from test_samplers import scheme

from emreason import progress, train
from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.module import EMModule
from emreason.engines.decoder import FusedDecoder
from emreason.engines.inprocess import InProcessEngine
from emreason.runs.journal import Journal
from emreason.tracking.m_step_bar import MStepBar
from emreason.types import Request, SamplingParams

EVERY_S = 0.2
SLOW_S = 3.0  # far from `EVERY_S`: a busy machine wakes the thread late


@pytest.fixture
def said(monkeypatch):
    """(second, line) of all that is said, with `EVERY_S` cut to a fifth of a second."""
    lines: list[tuple[float, str]] = []
    say = progress._Voice.say
    monkeypatch.setattr(progress, "EVERY_S", EVERY_S)
    monkeypatch.setattr(progress, "_voice", progress._Voice())  # an older one's thread may sleep for a second yet
    monkeypatch.setattr(progress._Voice, "say", lambda voice, line: (lines.append((time.monotonic(), line)), say(voice, line))[1])
    return lines


def wait_for(said, lines: int) -> None:
    deadline = time.monotonic() + 30
    while len(said) < lines and time.monotonic() < deadline:
        time.sleep(0.05)


def longest_silence(lines, start: float, end: float) -> float:
    times = [start, *(second for second, _ in lines if start <= second <= end), end]
    return max(b - a for a, b in itertools.pairwise(times))


def test_a_slow_engine_and_a_slow_m_step_are_heard(tmp_path, said, monkeypatch):
    """A whole run, with one slow draw and one slow optimizer step."""
    slow, generate, step = iter([SLOW_S]), InProcessEngine.generate, EMModule.training_step

    def slow_draws(engine, requests):
        sampled = bool(requests) and requests[0].params.temperature > 0
        for i, completion in enumerate(generate(engine, requests)):
            time.sleep(SLOW_S if sampled and i == 3 else 0)
            yield completion

    def slow_step(*arguments):
        time.sleep(next(slow, 0))
        return step(*arguments)

    monkeypatch.setattr(InProcessEngine, "generate", slow_draws)
    monkeypatch.setattr(EMModule, "training_step", slow_step)
    few = ["experiment=smoke", "dataset.limit.train=20", "dataset.limit.validation=2", "dataset.limit.test=2", "trainer.max_epochs=1"]
    start = time.monotonic()
    train.train(compose_config(*few, "engine.dtype=float32"), tmp_path / "run")
    assert longest_silence(said, start, time.monotonic()) < SLOW_S - 0.5, said
    heard = [line for _, line in said]
    for phase in ("E-step 0: ", "M-step 0: "):  # the same line again and again, while the draw or the step lasts
        assert max(Counter(line.partition(" · ")[0] for line in heard if line.startswith(phase)).values()) >= 4, phase
    assert [line for line in heard if line.startswith("M-step 0: ") and " · loss " in line]
    assert heard[0] == "Model tiny_llama (random weights), dataset sums"
    assert any(line.startswith("Loading model tiny_llama (random weights) · 0.1 million parameters in float32") for line in heard)


def test_the_m_step_counts_its_steps_and_supervised_tokens(tmp_path, said):
    questions = numbers(4)
    module = em_module()
    bar = MStepBar()
    module.engine = ScriptedEngine(module.tokenizer, gold_script(questions))
    e_step = EStep(scheme("rs"), questions, Journal(tmp_path), seed=1)
    trainer(tmp_path, [e_step, bar], 1).fit(module, RationaleDataModule([], []))
    record = module.finish_m_step()
    assert bar._bar is not None
    assert (bar._bar.done, bar._bar.tokens) == (record["steps"], record["tokens"])
    assert f"loss {record['nll']:.3f}" in said[-1][1]  # one step: the last loss is the mean one


def test_scoring_and_faithfulness_count_what_they_have_done(tmp_path, said):
    questions = numbers(4)
    module, gold = em_module(), gold_script(questions)
    module.engine = ScriptedEngine(module.tokenizer, lambda r: gold(r) if isinstance(r.key, tuple) else " 1")
    weighed = scheme("pps", 2, keep=2, weigh="importance")
    e_step = EStep(weighed, questions, Journal(tmp_path), seed=1, faithfulness=True)
    trainer(tmp_path, [e_step], 1).fit(module, RationaleDataModule([], []))
    drawn = len(questions) * weighed.budget
    last = [line for _, line in said if re.fullmatch(r"E-step 0, .*\.\d s", line)]  # on a busy machine others come before
    ends = [line.rsplit(" · ", 2) for line in last]
    assert [end[0] for end in ends] == [
        *2 * [f"E-step 0, scoring: {drawn}/{drawn} completions"],
        f"E-step 0, faithfulness: {drawn}/{drawn} rationales",
    ]
    assert all(int(end[1].removesuffix(" tokens/s")) > 0 for end in ends)


def test_work_in_one_call_is_heard_and_the_innermost_speaks(said):
    with progress.doing("Loading a model (1.00 GB)") as loading:
        assert said[-1][1] == "Loading a model (1.00 GB) …"  # at once
        with progress.doing("Converting", at_once=False):
            wait_for(said, 2)
        loading.note = "5 parameters"
    heard = [line for _, line in said]
    assert any(line.startswith("Converting · ") and line.endswith(" s so far") for line in heard)
    assert not any("Loading" in line and "so far" in line for line in heard)
    assert heard[-1].startswith("Loading a model (1.00 GB) · 5 parameters · ")


def test_the_reading_of_long_prompts_is_heard(said, monkeypatch):
    prefill = FusedDecoder.prefill

    def slow(decoder, jobs):
        wait_for(said, 1)
        prefill(decoder, jobs)

    monkeypatch.setattr(FusedDecoder, "prefill", slow)
    module = em_module()
    prompt = tuple(module.tokenizer(numbers(1)[0].text).input_ids)
    requests = deque([Request("q", prompt, SamplingParams(max_new_tokens=2))])
    assert len(list(InProcessEngine(module.model, module.tokenizer).generate(requests))) == 1
    assert {line.rpartition(" · ")[0] for _, line in said} == {f"Reading prompts, {len(prompt) - 1} tokens"}


def test_a_file_gets_lines_even_where_colours_are_forced(monkeypatch, capfd):
    """As continuous integration does; cursor movements would fill its log."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.bar("E-step", 2, "questions") as work:
        work.update(1)
        assert work.progress is None
    assert "\x1b[?25l" not in capfd.readouterr().err


def test_short_work_is_not_announced_and_ranks_but_the_first_are_silent(said, monkeypatch):
    with progress.doing("Writing", at_once=False):
        pass
    monkeypatch.setenv("LOCAL_RANK", "1")
    with progress.doing("Loading"), progress.bar("E-step", 3, "questions", enabled=False):
        time.sleep(0.5)
    assert said == []


def test_the_time_left_is_told_by_what_was_done_now_not_before_an_interruption(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    work = progress.Bar("E-step 1", 512, "questions", resumed=440, done=440, started=0.0)
    now[0] = 19.0
    work.update(3)
    assert "left" not in work.line()  # 3 of 72
    work.update(16)
    assert work.line().startswith("E-step 1: 459/512 questions")
    assert work.line().endswith(" · 53 s left")


def test_questions_settled_before_an_interruption_are_counted_at_once(tmp_path, said):
    questions = numbers(4)
    for _ in range(2):  # the second reads what the first has drawn
        module = em_module()
        module.engine = ScriptedEngine(module.tokenizer, gold_script(questions))
        trainer(tmp_path, [EStep(scheme("rs"), questions, Journal(tmp_path), seed=1)], 1).fit(module, RationaleDataModule([], []))
    first, second = [line for _, line in said if re.fullmatch(r"E-step 0: .*\.\d s", line)]
    assert first.startswith("E-step 0: 4/4 questions · accepted 100% · ")
    assert second.startswith("E-step 0: 4/4 questions · resumed · 0 tokens/s")


def test_what_is_said_is_plain_text(capfd):
    progress.say("[red]x[/red] :smile: \x1b[2J\x07\nsecond")
    assert capfd.readouterr().err == "[red]x[/red] :smile:  [2J \nsecond\n"
