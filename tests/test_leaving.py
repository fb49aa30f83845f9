"""What leaves a run: the model card, accepted rationales as chats, the merged adapter, the upload to the Hub."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import yaml
from conftest import REPO, TEMPLATE, numbers
from datasets import load_dataset
from transformers import AutoModelForCausalLM

import emreason
from emreason.models.tiny import tiny_tokenizer
from emreason.questions.prompts import Prompts, PromptTemplate
from emreason.runs.journal import Journal
from emreason.tracking.leaving import CHATS, push
from emreason.types import UserError


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; `files` is what was uploaded."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, Any]]] = []
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        host = f"http://{self.headers['Host']}"
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            self.asked.append((self.headers["Authorization"], json.loads(body)))
            answer = {"url": f"{host}/me/tiny", "name": "me/tiny", "id": "1"}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": "a" * 40, "commitUrl": f"{host}/me/tiny/commit/{'a' * 40}", "hookOutput": ""}
        self._answer(403 if self.refuses else 200, {"error": "no rights here"} if self.refuses else answer)

    def do_GET(self) -> None:
        self._answer(404, {"error": "nothing here"})

    def _answer(self, code: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[FakeHub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    FakeHub.files, FakeHub.asked, FakeHub.refuses = {}, [], False
    yield FakeHub
    server.shutdown()


JOB = ["experiment=smoke", "peft=lora", "peft.merge=true", "engine.dtype=float32", "trainer.max_epochs=2", "dataset.limit.test=8"]


def test_a_runs_card_chats_and_merged_model_go_to_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    hub.refuses = True
    with pytest.raises(UserError, match=r"hub\.push=me/tiny: .*the run is finished"):
        emreason.run(*JOB, "hub.push=me/tiny")
    folder = tmp_path / "outputs/smoke/sums/tiny_llama/rs-8/seed=1"
    before = (folder / "model/model.safetensors").stat().st_mtime_ns
    hub.refuses = False
    summary = emreason.run(*JOB, "hub.push=me/tiny")  # the upload alone is made again
    assert (folder / "model/model.safetensors").stat().st_mtime_ns == before
    assert (summary["status"], summary["pushed"]["to"]) == ("finished", "me/tiny")
    assert summary["pushed"]["commit"].endswith("/me/tiny/commit/" + "a" * 40)
    authorization, created = hub.asked[-1]
    assert authorization == "Bearer hf_secret"
    assert (created["name"], created["organization"], created["visibility"]) == ("tiny", "me", "private")
    assert hub.files == {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    uploads = len(hub.asked)
    emreason.run(*JOB, "hub.push=me/tiny")
    assert len(hub.asked) == uploads  # once is enough

    # the card
    head, text = (folder / "model/README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head) | {"tags": []} == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": []}
    for name, score in [("test, this model", summary["test"]), ("validation, iteration 2", summary["iterations"][1]["validation"])]:
        low, high = score["ci95"]
        assert f"| {name} | {score['n']} | {100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] |" in text.replace("\\", "")
    assert "emreason experiment=smoke peft=lora peft.merge=true engine.dtype=float32 trainer.max_epochs=2" in text
    assert "hub.push" not in text
    assert "secret" not in text
    assert str(tmp_path) not in text

    # the merged model answers as the trained one did
    AutoModelForCausalLM.from_pretrained(folder / "model")
    emreason.evaluation(f"run={folder}", "trainer.accelerator=cpu", "engine.dtype=float32")
    texts = [[json.loads(line)["text"] for line in (folder / f"predictions/{name}.jsonl").open()] for name in ("test", "evaluation_test")]
    assert texts[0] == sorted(texts[0], key=texts[0].index)
    assert sorted(texts[0]) == sorted(texts[1])

    # the chats
    loaded = load_dataset("json", data_files=str(folder / CHATS), split="train", cache_dir=str(tmp_path / "cache"))
    kept = [r for k in range(2) for r in Journal(folder).read(k) if r.accepted]
    assert [(r["iteration"], r["question_id"], r["completion"][0]["content"]) for r in loaded] == [
        (r.iteration, r.question_id, r.text.strip()) for r in kept
    ]
    assert all(message["role"] == "user" and "What is" in message["content"] for r in loaded for message in r["prompt"])
    hint = yaml.safe_load((folder / "config.yaml").read_text())["dataset"]["prompt"]["hint"].partition("{answer}")[0]
    assert len(hint) > 8
    assert not any(hint in message["content"] for r in loaded for message in r["prompt"])

    # the model, where it is not to be kept
    emreason.run(*JOB, "keep_model=false")
    assert (folder / "model").exists()  # that of a finished run was kept on purpose
    hub.refuses = True
    with pytest.raises(UserError, match="the run is finished"):
        emreason.run(*JOB, "keep_model=false", "hub.push=me/third", "overwrite=true")
    assert (folder / "model").exists()  # until it is uploaded
    hub.refuses = False
    assert emreason.run(*JOB, "keep_model=false", "hub.push=me/third")["pushed"]["to"] == "me/third"
    assert not (folder / "model").exists()
    assert list(folder.glob("rationales/*.jsonl*"))
    with pytest.raises(UserError, match="keep_model=true overwrite=true"):
        emreason.evaluation(f"run={folder}")
    with pytest.raises(UserError, match="kept no model"):
        emreason.run(*JOB, "hub.push=me/another")


def test_an_upload_without_a_token_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        emreason.run("experiment=smoke", "hub.push=me/tiny")
    with pytest.raises(UserError, match="ORG/NAME"):
        emreason.run("experiment=smoke", "hub.push=tiny", "overwrite=true")


SYSTEM = "{% if messages[0]['role'] == 'system' %}S {{ messages[0]['content'] }} {% endif %}"
TURNS = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize(("chat_template", "roles"), [(SYSTEM + TURNS, ["system", "user"]), (REFUSES + TURNS, ["user"]), (None, ["user"])])
def test_a_chat_has_a_system_message_where_the_models_template_shows_one(chat_template, roles):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    prompts = Prompts(tokenizer, PromptTemplate("Think.", TEMPLATE.hint, system="Be brief."), ())
    messages = prompts.messages(numbers(1)[0])
    assert [m["role"] for m in messages] == roles
    assert "Be brief." in messages[0]["content"]
    if chat_template is not None:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == prompts.text(numbers(1)[0])


@pytest.mark.slow
def test_trl_trains_on_the_chats_as_they_are(tmp_path):
    python = REPO / ".venvs/trl-cpu/bin/python"
    if not python.exists():
        pytest.skip("needs .venvs/trl-cpu (make bench makes it)")
    from emreason.models.tiny import load_tiny
    from emreason.tracking.leaving import write_chats

    model, tokenizer = load_tiny()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts, questions = Prompts(tokenizer, TEMPLATE, ()), numbers(24)
    scheme = emreason.Scheme("rs", "RS-8", 8, {"question": 8}, max_new_tokens=24)
    journal = Journal(tmp_path)
    drawn = emreason.sample(questions, scheme, emreason.InProcessEngine(model, tokenizer), prompts, tokenizer, seed=1, iteration=0)
    from emreason.runs.journal import journal_record

    by_id = {q.id: q for q in questions}
    journal.finalize(0, [journal_record(by_id[r.question_id], r) for r in drawn])
    write_chats(tmp_path, 1, questions, prompts)
    lines = [json.loads(line) for line in (tmp_path / CHATS).open()]
    assert lines
    expected = {json.dumps(line["prompt"]): list(prompts.ids(by_id[line["question_id"]])) for line in lines}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    done = subprocess.run([python, REPO / "tests/trl_sft.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"trained on {len(lines)}" in done.stdout


def test_a_hub_that_fails_in_whatever_way_is_one_sentence(tmp_path, monkeypatch):
    class OfAnotherClient(Exception):
        pass

    def create_repo(*_, **__):
        raise OfAnotherClient("Connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    with pytest.raises(UserError, match=r"hub\.push=me/x: Connection refused; the run is finished, and the same command"):
        push(tmp_path, "me/x", private=True)
