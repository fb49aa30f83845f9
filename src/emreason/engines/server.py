"""A vLLM server of one's own, on other GPUs: it draws for all ranks, and is given their weights through files that it sees, too.

Started with `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls emreason.engines.handover.TakeWeights`, in an environment where
emreason is installed (`pip install --no-deps emreason`, with peft). Development mode has no guard: not on an address that others reach.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from torch import nn

from emreason.models.loading import weights_fingerprint
from emreason.progress import rank
from emreason.types import UserError


@dataclass
class Drawn:
    """What a request has come to: ids and their log-probabilities at temperature 1 so far; `ended`: stop or length, once it has."""

    name: str
    ids: list[int]
    logprobs: list[float]
    ended: str | None


class Server:
    """The same calls as `LocalVllm`, over HTTP. A thread reads each answer as it is drawn.

    Raises:
        UserError: it does not answer, or was not started as it must be.
    """

    def __init__(self, url: str, max_batch: int):
        self.url = url.rstrip("/")
        served = self._ask("/v1/models")["data"][0]
        self.model, self.context = str(served["id"]), int(served["max_model_len"])
        self._ask("/weight_info")
        self._threads = ThreadPoolExecutor(max_batch, thread_name_prefix="vllm")
        self._drawn: queue.SimpleQueue[tuple[threading.Event, Drawn | Exception]] = queue.SimpleQueue()
        self._running: dict[str, threading.Event] = {}
        self._wanted: str | None = None

    def add(self, name: str, prompt_ids: list[int], params: dict[str, Any]) -> None:
        self._running[name] = dropped = threading.Event()
        # what is not given here the server takes from the model's generation_config
        neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        body = {"model": self.model, "prompt": prompt_ids, "stream": True, "return_token_ids": True, **neutral, **params}
        self._threads.submit(self._read, name, body, dropped)

    def _read(self, name: str, body: dict[str, Any], dropped: threading.Event) -> None:
        ids: list[int] = []
        logprobs: list[float] = []
        ended: str | None = None
        try:
            with self._open("/v1/completions", body) as lines:
                for line in lines:
                    if dropped.is_set():
                        return  # closing the connection ends the request there
                    if not line.startswith(b"data: {"):
                        continue
                    part = json.loads(line[6:])
                    if "error" in part:
                        raise UserError(f"engine.server={self.url}: {part['error'].get('message')}.")
                    for choice in part["choices"]:
                        ids += choice.get("token_ids") or []
                        logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
                        if (ended := choice.get("finish_reason")) not in (None, "stop", "length"):
                            raise self._lost(f"it ended with {ended!r}")
                        # lists of its own: this thread goes on writing
                        self._drawn.put((dropped, Drawn(name, list(ids), list(logprobs), ended)))
            if ended is None:
                raise self._lost("it ended")  # a server that is killed just stops sending
        except (OSError, HTTPException, ValueError) as error:  # the last: a line that was cut
            self._drawn.put((dropped, self._lost(error)))
        except Exception as error:  # whatever it is, the thread that waits for it must hear of it
            self._drawn.put((dropped, error))

    def step(self) -> list[Drawn]:
        while True:
            dropped, drawn = self._drawn.get()
            if dropped.is_set():
                continue  # of an earlier request
            if isinstance(drawn, Exception):
                raise drawn
            if drawn.ended is not None:
                dropped.set()
            return [drawn]

    def abort(self, names: list[str]) -> None:
        for name in names:
            self._running.pop(name).set()

    def call(self, name: str, *arguments: str) -> None:
        self._ask("/collective_rpc", {"method": name, "args": arguments})

    def wants(self, model: nn.Module) -> bool:
        """Whether this rank is to hand the weights over: the first one does, if they are others than those there; the others wait."""
        self._wanted = weights_fingerprint(model)
        while not self.holds():
            if rank() == 0:
                self._ask("/update_weight_version", {"new_version": "incomplete"})  # until they are there whole
                return True
            time.sleep(0.2)
        return False

    def holds(self) -> bool:
        """Whether it still has what was wanted last: it may have been started anew."""
        return bool(self._ask("/weight_info")["weight_version"] == self._wanted)

    def took(self, model: nn.Module) -> None:  # noqa: ARG002
        while not self._ask("/reset_prefix_cache", {})["success"]:
            time.sleep(0.05)  # a request that was dropped is still going on there
        self._ask("/update_weight_version", {"new_version": self._wanted})

    def sleep(self) -> bool:
        return False

    @contextmanager
    def awake(self) -> Iterator[None]:
        yield

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            with self._open(path, body) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except (OSError, HTTPException, ValueError) as error:
            raise self._lost(error) from error

    def _lost(self, why: object) -> UserError:
        return UserError(f"engine.server={self.url}: the connection was lost ({why}); start it, then the same command resumes the run.")

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:200]
            raise UserError(
                f"engine.server={self.url}: {path} failed ({error.code} {said}); it must have been started with {START}."
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"engine.server={self.url}: no answer ({error}); start it, then the same command resumes the run.") from error


START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls emreason.engines.handover.TakeWeights"
