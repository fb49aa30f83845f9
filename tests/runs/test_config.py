"""Every config composes and resolves; what is installed finds its configs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from itertools import combinations, zip_longest
from pathlib import Path

import hypothesis
import lightning
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from emreason.evaluate import result_file
from emreason.reports.sweep import _top, untold
from emreason.runs import experiment
from emreason.runs.checks import check_values, quoted
from emreason.runs.experiment import CONF, read
from emreason.runs.journal import write_json
from emreason.runs.keys import EVALUATION_KEYS, INSTEAD, SECTIONS, TRAIN_KEYS, TRAINER_KEYS, check_keys, flatten
from emreason.runs.summary import check_same_config
from emreason.schemes.samplers import Scheme
from emreason.types import UserError

GROUPS = [(p.parent.name, p.stem) for p in sorted(Path(CONF).glob("*/*.yaml")) if p.stem != "base" and p.parent.name != "prompt"]


def compose_config(*overrides: str, name: str = "train"):
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(name, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.hydra.runtime.output_dir = "out"
        return cfg


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_composes_and_resolves(group, option):
    extra = {"gguf": ["model.load.path=x.gguf"], "hub": ["dataset.load.path=x/y"]}.get(option, [])
    cfg = compose_config(f"{group}={option}", *extra)
    OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)


MAY_CHANGE = {
    "task", "trainer", "token_budget", "logger", "rationale_rows", "evaluation.diagnostics", "overwrite", "keep_checkpoints", "keep_model",
    "data_root", "dataset.load.data_root", "engine.max_batch", "quiet", "plan", "hub", "peft.merge", "engine.memory", "engine.shared",
    "engine.server", "engine.cuda_graphs", "m_step.tokens_per_batch", "m_step.gradient_checkpointing", "m_step.on_zero_accepted",
}  # fmt: skip
"""What alters neither what is sampled nor what is learned nor how it is scored."""


def test_a_resumed_run_may_change_nothing_else(tmp_path, monkeypatch):
    cfg = compose_config("experiment=smoke", "logger=tensorboard", "peft=lora")
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    begun = OmegaConf.to_yaml(cfg, resolve=True, sort_keys=False)
    (tmp_path / "config.yaml").write_text(begun)
    check_same_config(tmp_path, begun)
    older = OmegaConf.create(begun)
    del older.callbacks  # of a version that had no such group
    check_same_config(tmp_path, OmegaConf.to_yaml(older))
    leaves = flatten(OmegaConf.to_container(OmegaConf.create(begun)))
    assert len(leaves) > 60
    monkeypatch.setattr("emreason.runs.summary.read_config", lambda _: OmegaConf.create(begun))  # once is enough
    for key in leaves:
        changed = OmegaConf.create(begun)
        OmegaConf.update(changed, key, "another")
        free = any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)
        with contextlib.nullcontext() if free else pytest.raises(UserError, match=re.escape(f"({key}: ")):
            check_same_config(tmp_path, OmegaConf.to_yaml(changed))


def test_the_three_schemes():
    tries = {}
    for name in ("rs", "star", "pps"):
        scheme = instantiate(compose_config(f"sampler={name}").sampler)
        assert isinstance(scheme, Scheme)
        tries[scheme.display] = scheme.tries
    assert tries == {
        "RS-4": ("question",) * 4,
        "STaR": ("question", "rationalization"),
        "PPS": ("rationalization",),
    }
    assert instantiate(compose_config("sampler=rs", "sampler.budget=2").sampler).display == "RS-2"


def test_run_folders_differ_where_runs_do():
    folders = {
        compose_config(*overrides).hydra.run.dir
        for overrides in (["seed=1"], ["seed=2"], ["sampler=pps"], ["sampler=rs"], ["sampler=rs", "sampler.budget=1"], ["tag=x"])
    }
    assert len(folders) == 6


EXPERIMENTS, DATASETS, SAMPLERS, MODELS, ENGINES, LOGGERS = (
    [option for group, option in GROUPS if group == name] for name in ("experiment", "dataset", "sampler", "model", "engine", "logger")
)
OPTIONS = {
    "experiment": [None, *EXPERIMENTS],
    "dataset": [None, *DATASETS],
    "sampler": [None, *SAMPLERS],
    "model": [None, *MODELS],
    "engine": ENGINES,
    "logger": LOGGERS,
}
NEEDED = {"hub": "dataset.load.path=x/y", "gguf": "model.load.path=x.gguf"}
"""What these options cannot do without."""


@functools.cache
def alone() -> dict[tuple[str, str], DictConfig]:
    """Every dataset, sampler, model and engine as it is composed without an experiment."""
    found = {}
    with initialize_config_dir(CONF, version_base="1.3"):
        for row in zip_longest(DATASETS, SAMPLERS, MODELS, ENGINES):
            options = {g: o for g, o in zip(("dataset", "sampler", "model", "engine"), row, strict=True) if o is not None}
            cfg = compose("train", [*(f"{g}={o}" for g, o in options.items()), *(NEEDED[o] for o in options.values() if o in NEEDED)])
            found |= {(group, option): cfg[group] for group, option in options.items()}
    return found


def like(group: str, option: str | None) -> str:
    """Options with the same keys and targets compose alike."""
    if (group, option) not in alone():
        return str(option)
    node = flatten(OmegaConf.to_container(alone()[group, str(option)]))
    return repr(sorted((key, value if key.endswith("_target_") else "") for key, value in node.items() if "[" not in str(value)))


def covering() -> Iterator[dict[str, str | None]]:
    """Rows in which every pair of options of two groups occurs, options that are alike taken as one and used in turn; greedy."""
    kinds: dict[str, list[list[str | None]]] = {}
    for group, options in OPTIONS.items():
        alike: dict[str, list[str | None]] = {}
        for option in options:
            alike.setdefault(like(group, option), []).append(option)
        kinds[group] = list(alike.values())
    pairs = list(combinations(kinds, 2))
    missing = {(a, i, b, j) for a, b in pairs for i in range(len(kinds[a])) for j in range(len(kinds[b]))}
    while missing:
        a, i, b, j = min(missing)
        row = {a: i, b: j}
        for group in [group for group in kinds if group not in row]:
            trials = [row | {group: k} for k in range(len(kinds[group]))]
            gains = [sum((a, t[a], b, t[b]) in missing for a, b in pairs if a in t and b in t) for t in trials]
            row = trials[gains.index(max(gains))]
        missing -= {(a, row[a], b, row[b]) for a, b in pairs}
        yield {group: kinds[group][k][0] for group, k in row.items()}
        for group, k in row.items():
            kinds[group][k].append(kinds[group][k].pop(0))


def test_every_pair_of_options_composes_and_is_checked():
    """And runs, or is told in one sentence."""
    told, used, rows = {}, set(), list(covering())
    with initialize_config_dir(CONF, version_base="1.3"):
        for row in rows:
            used |= set(row.items())
            given = [f"{group}={option}" for group, option in row.items() if option is not None]
            cfg = compose("train", overrides=[*given, *(NEEDED[option] for option in row.values() if option in NEEDED)])
            try:
                check_keys(cfg, {*TRAIN_KEYS, "laboratory"})
                check_values(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "laboratory"]))
                OmegaConf.to_container(cfg, resolve=True)
            except UserError as error:
                told[" ".join(given)] = str(error)
    assert used == {(group, option) for group, options in OPTIONS.items() for option in options}
    assert all("\n" not in message for message in told.values())
    lacking = ("has no GPU", "needs the package")  # what this machine lacks, and nothing else
    assert not [(given, message) for given, message in told.items() if not any(words in message for words in lacking)]


def test_an_experiment_writes_only_what_every_option_of_a_group_has():
    """Else it would hand the option that somebody chooses a key of another."""
    absent = object()
    for path in sorted(Path(CONF, "experiment").glob("*.yaml")):
        for key in flatten(OmegaConf.to_container(OmegaConf.load(path))):
            group, _, inner = key.partition(".")
            nodes = {option: node for (of, option), node in alone().items() if of == group}
            without = [option for option, node in nodes.items() if OmegaConf.select(node, inner, default=absent) is absent]
            assert not without, f"{path.name} writes {key}"


def test_the_lists_of_keys_are_those_of_the_configs():
    for name, known in (("train", TRAIN_KEYS), ("evaluate", EVALUATION_KEYS)):
        assert set(compose_config(name=name)) - {"hydra"} == known - {"trial"}
    cfg = compose_config("peft=lora")
    for section, keys in SECTIONS.items():
        node = alone()["dataset", "hub"].load.splits if section == "dataset.load.splits" else OmegaConf.select(cfg, section)
        assert set(node) == keys, section


def test_every_argument_of_the_trainer_is_taken_or_told_what_does_its_work():
    arguments = set(inspect.signature(lightning.Trainer).parameters)
    assert arguments == TRAINER_KEYS | INSTEAD.keys()
    assert not TRAINER_KEYS & INSTEAD.keys()


def test_a_key_that_another_value_names_is_read():
    cfg = compose_config("+mine=x", "tag=${mine}")
    check_values(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))


NAMES = ["~/my.jsonl", "a [1].jsonl", "übung.jsonl", "问题.jsonl", "a#b.jsonl", "a&b.jsonl", "it's.jsonl", 'say "x".jsonl', "a b.jsonl",
         "seed=1/a.jsonl", "{x}.jsonl", "(1).jsonl", "100%.jsonl", "a\\b.jsonl", "a\\'b.jsonl", "end\\", "1.jsonl", "$x.jsonl",
         "null.jsonl", "true", "[x]", "a:b;c.jsonl", "*.jsonl", " lead.jsonl", "-x.jsonl", "a,b.jsonl"]  # fmt: skip


@pytest.mark.parametrize("key", ["dataset.path", "dataset.load.train", "data_root", "model.load.path", "hydra.run.dir"])
def test_a_path_reaches_the_config_as_it_is_typed(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.jsonl").touch()  # a comma in the name of a file, not between two
    for name in NAMES:
        parsed = OverridesParser.create().parse_override(quoted(f"{key}={name}"))
        assert (parsed.key_or_group, parsed.value()) == (key, name)
    assert compose_config("dataset=file", quoted(f"dataset.path={NAMES[1]}")).dataset.path == NAMES[1]


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"], exclude_characters=",\"'"), min_size=1, max_size=8))
def test_any_path_does(name):
    hypothesis.assume("${" not in name and name.strip() and name != "null")
    parsed = OverridesParser.create().parse_override(quoted(f"dataset.path=x{name}'y"))
    assert parsed.value() == f"x{name}'y"


def test_what_is_no_path_is_left_to_hydra():
    for argument in ["sampler=rs,star", "dataset.columns.question=[a,b]", "seed=range(1,3)", "data_root=null", "dataset.path='x y'", "~tag",
                     "-m", "tag=${seed}", "optimizer.lr=1e-5", "evaluation.baseline=[test", "dataset.path=", "sampler.budget"]:  # fmt: skip
        assert quoted(argument) == argument
    assert quoted("dataset.path=a 1.jsonl,ü.jsonl") == "dataset.path='a 1.jsonl','ü.jsonl'"  # two jobs of a sweep
    assert quoted("hydra.run.dir=a b,c", sweep=False) == "hydra.run.dir='a b,c'"
    assert quoted("tag=ä#1") == "tag='ä#1'"
    assert quoted("dataset.columns.question=Frage (neu)") == "dataset.columns.question='Frage (neu)'"


@pytest.mark.parametrize("option", LOGGERS)
def test_a_logger_outside_hydra_writes_into_the_run_folder(option, tmp_path, monkeypatch):
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", overrides=[f"logger={option}"])  # as in a notebook: no HydraConfig
    HydraConfig.instance().cfg = None
    started = []
    monkeypatch.setattr("emreason.tracking.dashboard._start", lambda folder, *_, **__: started.append(folder))
    lacking = {"tensorboard": "tensorboard", "trackio": "trackio", "mlflow": "mlflow"}.get(option)
    if lacking is not None:
        pytest.importorskip(lacking, reason=f"needs pip install 'emreason[{lacking}]'")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if option == "mlflow":
        cfg.logger.mlflow.tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "config.yaml").write_text(read(cfg).text)
    loggers = read(cfg).loggers(tmp_path)
    assert len(loggers) == (option != "none")
    assert started == ([tmp_path] if option == "wandb" else [])
    if option in ("csv", "tensorboard"):
        assert Path(loggers[0].save_dir) == tmp_path
    if option == "mlflow":
        return  # its address is in the config
    assert str(tmp_path) not in (tmp_path / "config.yaml").read_text()  # a run folder may be moved


def test_several_loggers_and_callbacks_at_once(tmp_path):
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", overrides=["logger=[csv,wandb]", "callbacks=[early_stopping,none]", "logger.wandb.project=mine"])
    assert list(cfg.logger) == ["csv", "wandb"]
    cfg.logger.wandb = {"_target_": "lightning.pytorch.loggers.CSVLogger", "_partial_": True, "name": "another"}
    settings = read(cfg)
    assert [(type(each).__name__, each.name) for each in settings.loggers(tmp_path)] == [("CSVLogger", "csv"), ("CSVLogger", "another")]
    assert [type(each) for each in settings.callbacks] == [lightning.pytorch.callbacks.EarlyStopping]
    cfg.logger = cfg.logger.csv  # as somebody's own YAML may have it
    assert [each.name for each in read(cfg).loggers(tmp_path)] == ["csv"]


def test_what_a_gpu_cannot_draw_deterministically_is_refused(monkeypatch):
    cfg = compose_config("experiment=smoke", "+trainer.deterministic=true")
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    assert read(cfg).seed == 1
    monkeypatch.setattr(experiment, "on", lambda _: "cuda")
    with pytest.raises(UserError, match="use warn"):
        read(cfg)


def test_the_evaluation_config_composes():
    cfg = compose_config(name="evaluate")
    assert cfg.split == "test"


def test_results_of_one_run_do_not_replace_each_other(tmp_path):
    (tmp_path / "config.yaml").write_text("dataset: {name: sums}\n")
    asked = [[], ["split=validation"], ["method=loglikelihood"], ["dataset=arc_easy"], ["dataset=arc_easy", "method=loglikelihood"]]
    asked += [["dataset=arc_easy", f"dataset.name={name}", *more] for name in ["of/ai2"] for more in ([], ["samples=4"])]
    asked += [["sampler.max_new_tokens=9"], ["dataset.limit.test=5"], ["examples=2"], ["samples=8"], ["samples=8", "seed=2"]]
    configs = [experiment.compose([f"run={tmp_path}", *overrides], "evaluate")[0] for overrides in asked]
    files = []
    for cfg in configs:
        files.append(result_file(cfg, tmp_path))
        assert not files[-1].exists()
        write_json(files[-1], {"accuracy": 0.5, "config": OmegaConf.to_container(cfg, resolve=True)})
    assert files[0].name == "evaluation_test.json"
    assert files[-1].name == "evaluation_test-6.json"
    assert [result_file(cfg, tmp_path) for cfg in configs] == files  # the same again replaces its own
    assert result_file(experiment.compose([f"run={tmp_path}", "data_root=/moved"], "evaluate")[0], tmp_path) == files[0]
    (tmp_path / "evaluation_train.json").write_text('{"accuracy": 1.0}')  # of an earlier version, which did not say
    assert result_file(experiment.compose([f"run={tmp_path}", "split=train"], "evaluate")[0], tmp_path).name == "evaluation_train.json"


@pytest.mark.parametrize(
    "override",
    [
        "sampler.budget=0", "sampler.budget=1.5", "sampler.temperature=-1.0", "sampler.top_p=0.0", "sampler.max_new_tokens=0",
        "sampler.worked_examples=-1", "sampler.keep=0", "sampler.weigh=much", "sampler.truncate=0.5", "sampler.choose=some",
        "sampler.share=0", "sampler.share=1.5", "m_step.epochs=0", "m_step.batch_size=0", "m_step.tokens_per_batch=-1", "m_step.init=zero",
        "m_step.normalize=mean", "m_step.max_grad_norm=0.0", "m_step.optimizer=drop", "m_step.on_zero_accepted=stop",
        "m_step.warmup_steps=-1",
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=key):
        check_values(compose_config(override))


def test_a_sweep_knows_which_keys_tell_its_jobs_apart(tmp_path):
    def asked(*task, **more):
        cfg = compose_config("experiment=smoke", *(f"{key}={value}" for key, value in more.items()))
        cfg.hydra.overrides.task = list(task)
        return untold(cfg)

    told = ["seed=1,2", "sampler=rs,pps", "sampler.budget=1,2", "dataset=sums_2,sums_3", "experiment=smoke,demo", "+mine=a,b", "tag=a,b"]
    assert asked(*told) is None
    assert asked("optimizer.lr=1e-3") is None  # one value
    assert asked("model.name=${hydra:job.num}", "optimizer.lr=1,2") == "optimizer.lr"  # nothing is resolved yet
    assert asked("seed=1,2", "optimizer.lr=1e-3,1e-4") == "optimizer.lr"
    assert asked("dataset.limit.train=8,16") == "dataset.limit.train"
    assert asked("callbacks=none,early_stopping") == "callbacks"
    assert asked("optimizer.lr=1e-3,1e-4", tag="'x-${optimizer.lr}'") is None
    for subdir in ("${hydra:job.num}", "${hydra.job.num}", "${hydra.job.override_dirname}"):
        assert asked("optimizer.lr=1e-3,1e-4", **{"hydra.sweep.subdir": f"'{subdir}'"}) is None
    cfg = compose_config("experiment=smoke")
    cfg.hydra.sweep.dir = str(tmp_path / "runs")
    inside, elsewhere = tmp_path / "runs/a/seed=1", [tmp_path / "mine/a/seed=1", tmp_path / "mine/b/seed=1"]
    assert _top(cfg, [inside]) == tmp_path / "runs"
    assert _top(cfg, elsewhere) == tmp_path / "mine"
