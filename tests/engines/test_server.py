"""A vLLM server that goes away in mid-answer: the run hears of it, in one sentence."""

from __future__ import annotations

import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from emreason.engines.server import Server
from emreason.types import UserError

MODELS = {"data": [{"id": "m", "max_model_len": 100}]}


def part(**choice) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, **choice}]}).encode() + b"\n\n"


@pytest.fixture
def served():
    """`served(end)`: a server that sends one token, then does `end(handler)`."""
    servers = []

    def start(end) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(json.dumps(MODELS if self.path == "/v1/models" else {}).encode())

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(part())
                end(self)

            def answer(self, body):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Server(f"http://127.0.0.1:{server.server_port}", 4)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reset(handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def heard(server: Server) -> list:
    """What `step` gives until a request has ended; what it raises. It must not wait for ever."""
    found: list = []

    def steps():
        try:
            while not found or found[-1].ended is None:
                found.extend(server.step())
        except Exception as error:
            found.append(error)

    server.add("q", [1, 2], {"max_tokens": 3})
    thread = threading.Thread(target=steps, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return found


def aborted(handler) -> None:
    handler.wfile.write(part(finish_reason="abort"))


def cut(handler) -> None:
    handler.wfile.write(part(finish_reason="stop")[:-9])


@pytest.mark.parametrize("end", [lambda _: None, reset, aborted, cut], ids=["closed", "reset", "aborted", "cut"])
def test_a_server_that_goes_away_in_mid_answer_is_one_sentence(served, end):
    *_, last = heard(served(end))
    assert isinstance(last, UserError)
    assert "the connection was lost" in str(last)
    assert "the same command resumes the run" in str(last)


def test_weights_that_did_not_arrive_whole_are_not_taken_for_the_old_ones(served, monkeypatch, tiny):
    """A run that is killed while it hands weights over; a server that is started anew."""
    there = {"weight_version": "default"}
    server = served(lambda _: None)

    def ask(path, body=None):
        if path == "/update_weight_version":
            there["weight_version"] = body["new_version"]
        return there | {"success": True}

    monkeypatch.setattr(server, "_ask", ask)
    assert server.wants(tiny[0])
    server.took(tiny[0])
    assert server.holds()
    assert not server.wants(tiny[0])
    held = dict(there)
    with torch.no_grad():
        next(tiny[0].parameters()).add_(1)
    assert server.wants(tiny[0])  # and is killed
    assert there != held
    there["weight_version"] = "default"
    assert not server.holds()


def test_an_answer_that_is_whole_is_no_loss(served):
    drawn = heard(served(lambda handler: handler.wfile.write(part(finish_reason="stop") + b"data: [DONE]\n\n")))
    assert [(d.ids, d.ended) for d in drawn] == [([5], None), ([5, 5], "stop")]
