"""`summary.json`: what a run has come to, and on what; and whether another command may go on with it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf

from emreason import __version__
from emreason.progress import doing, rank, say
from emreason.runs.journal import write_json
from emreason.runs.keys import MAY_CHANGE, flatten, within
from emreason.types import Split, UserError

if TYPE_CHECKING:
    from emreason.questions.datasets import Dataset

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "hydra-core", "vllm")


class Summary:
    """`summary.json`, replaced atomically at every change; an earlier one in the folder is continued, unless `anew`."""

    def __init__(self, folder: Path, identity: dict[str, Any], anew: bool = False):
        self.path = folder / "summary.json"
        before = {} if anew else read_summary(folder)  # which another rank may still be removing
        self._spent = float(before.get("seconds") or 0.0)
        self._start = time.monotonic()
        self.values: dict[str, Any] = {
            **identity,
            "status": "running",
            "dtype": before.get("dtype"),
            "data": before.get("data"),
            "baseline": before.get("baseline"),
            "test": before.get("test"),
            "iterations": before.get("iterations", []),
            "seconds": self._spent,
            "peak_memory_bytes": before.get("peak_memory_bytes", 0),
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def update(self, **values: Any) -> None:
        """Change keys and write the file; the first rank alone does."""
        if rank() > 0:
            return
        self.values.update(values)
        self.values["seconds"] = round(self._spent + time.monotonic() - self._start, 3)
        self.values["peak_memory_bytes"] = max(self.values["peak_memory_bytes"] or 0, peak_memory_bytes())
        write_json(self.path, self.values)


def tokens_drawn(iterations: list[dict[str, Any]]) -> int:
    """What the E-steps of a summary's iterations have generated, accepted or not."""
    return sum(record["e_step"]["tokens"] for record in iterations)


def iterations_wanted(done: list[dict[str, Any]], max_epochs: int, token_budget: int | None) -> int:
    """EM iterations in all; no more than are done where these have used up the token budget, or a callback has ended the run."""
    spent = token_budget is not None and tokens_drawn(done) >= token_budget
    ended = spent or bool(done and done[-1].get("stopped") == "callback")
    return min(len(done), max_epochs) if ended else max_epochs


def begun(folder: Path, before: dict[str, Any]) -> bool:
    """Whether the run folder with this summary holds anything that another config must not continue."""
    return before.get("baseline") is not None or bool(before.get("iterations")) or (folder / "rationales").exists()


def ended(folder: Path, config: str, dataset: Dataset, max_epochs: int, token_budget: int | None) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do under this config; None where it begins or goes on.

    Raises:
        UserError: the run was begun under another config or with other questions.
    """
    before, path = read_summary(folder), folder / "config.yaml"
    done = before.get("iterations", [])
    finished = before.get("status") == "finished" and len(done) >= iterations_wanted(done, max_epochs, token_budget)
    if begun(folder, before):
        check_same_config(folder, config)
        check_same_data(before.get("data"), dataset, finished)
    if not finished:
        return None
    if path.exists() and (merged := _merge(read_config(path))) != (asked := _merge(OmegaConf.create(config))):
        raise UserError(f"peft.merge={asked}: this run is finished, its model/ written with {merged}; overwrite=true trains it again.")
    return before


def _merge(config: Any) -> bool:
    return bool(OmegaConf.select(config, "peft.merge"))


def check_same_config(folder: Path, config: str) -> None:
    """Refuse to continue a run under another config.

    Raises:
        UserError: what `folder/config.yaml` says differs in a key that alters the run; names the keys and the ways out.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    before, now = flatten(OmegaConf.to_container(read_config(path))), flatten(OmegaConf.to_container(OmegaConf.create(config)))
    before, now = ({key: value for key, value in config.items() if value != {}} for config in (before, now))  # an empty group is no setting
    differing = [
        f"{key}: {before.get(key)!r} → {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not within(key, MAY_CHANGE)
    ]
    if differing:
        raise UserError(
            f"{folder} holds a run with another configuration ({'; '.join(differing[:8])}); "
            "resume it with the old values, begin again with overwrite=true, or choose another tag=…."
        )


def check_same_data(before: Mapping[Split, str] | None, dataset: Dataset, finished: bool = False) -> None:
    """Refuse to continue a run on other questions than it was begun with: splits would mix.

    Args:
        before: its `Dataset.fingerprint`; None of a run from before there was one.
        finished: it needs the data no more, which may be gone.

    Raises:
        UserError: names the splits; or the data cannot be read.
    """
    if before is None:
        return
    try:
        with doing(f"Reading dataset {dataset.name}", at_once=False):
            now = dataset.fingerprint()
    except (UserError, OSError) as error:
        if not finished:
            raise
        say(f"This run is finished; its data cannot be read, so whether it has changed is not known ({error})")
        return
    if changed := [split for split in now if before.get(split) != now[split]]:
        raise UserError(
            f"The data of this run ({', '.join(changed)}) has changed since it began; restore it, begin again with overwrite=true, or "
            "choose another tag=…."
        )


def read_config(path: Path) -> DictConfig:
    """The config of a run.

    Raises:
        UserError: the file is not a config.
    """
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not YAML ({error}); restore it, or begin again with overwrite=true.") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is not a run's config; restore it, or begin again with overwrite=true.")
    return config


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """An iteration's record as `e_step/tokens`, `validation/ci95/low`, …, with `e_step/tokens_per_accepted`; numbers alone."""
    parts = {part: dict(values) for part, values in record.items() if isinstance(values, dict)}
    for values in parts.values():
        if values.get("ci95"):
            values["ci95"] = dict(zip(("low", "high"), values["ci95"], strict=True))
        if values.get("accuracy_by_position"):
            values["accuracy_by_position"] = {letter: of["accuracy"] for letter, of in values["accuracy_by_position"].items()}
    if (e_step := parts.get("e_step", {})).get("accepted") and e_step.get("tokens"):
        e_step["tokens_per_accepted"] = e_step["tokens"] / e_step["accepted"]
    flat = {key.replace(".", "/"): value for key, value in flatten(parts).items()}
    return {key: value for key, value in flat.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}


def best_iteration(iterations: list[dict[str, Any]]) -> int:
    """The earliest of a summary's iterations with the highest validation accuracy."""
    return int(max(iterations, key=lambda r: (r["validation"]["accuracy"], -r["iteration"]))["iteration"])


def read_summary(folder: Path, name: str = "summary.json") -> dict[str, Any]:
    """The summary, or the evaluation `name`, of a run folder, empty if it has none that can be read."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far (and with CUDA, plus the largest allocation on the device)."""
    _highest.append(_peak())
    _highest[:] = [max(_highest)]
    return _highest[0]


def phase_memory_bytes() -> int:
    """The same since it was asked last: the peak of a phase. Where the system keeps one peak alone, that."""
    peak = _peak()
    peak_memory_bytes()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak
    if _cuda():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    return peak


_highest: list[int] = []
"""The largest peak of all phases: each forgets that of the one before."""


def _peak() -> int:
    scale = 1 if platform.system() == "Darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return resident + (sys.modules["torch"].cuda.max_memory_allocated() if _cuda() else 0)


def _cuda() -> bool:
    torch = sys.modules.get("torch")  # nothing was allocated where it is not loaded
    return torch is not None and torch.cuda.is_available()


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"emreason": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, with `+dirty` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed somewhere inside another project's checkout
    commit = git("rev-parse", "HEAD")
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "-uno") else commit
