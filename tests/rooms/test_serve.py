"""A base with a delta, and an assembly, behind OpenAI's interface: the answers are generate's, bad requests are told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.verbs.assemble import assemble
from luthier.verbs.generate import Speaker
from luthier.verbs.serve import NoModel, Request, Server, serve, streamed
from tests.moves import base_at, delta_of

ASKED = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    base_at(folder / "small")
    delta_of(folder / "small", "lora", rank=4, size=0.5).save(folder / "lora")
    assemble({"large": str(folder / "small"), "pairs": [str(folder / "lora")]}, out=folder / "steered")
    return folder


@pytest.fixture(scope="module", params=["delta", "assembly"])
def server(request: pytest.FixtureRequest, place: Path) -> Server:
    if request.param == "delta":
        return Server(Speaker(str(place / "small"), [str(place / "lora")]), "lora", max_new_tokens=6)
    return Server(Speaker(str(place / "steered")), "lora", max_new_tokens=6)


def ask(server: Server, chat: bool = False, **fields: Any) -> dict[str, Any]:
    return server.complete(Request.model_validate({"temperature": 0, **fields}), chat)


def test_answers_are_those_of_generate(server: Server) -> None:
    given = ask(server, prompt=["one two", "three"])
    texts = server.speaker.answer(["one two", "three"], max_new_tokens=6, raw=True)
    assert [c["text"] for c in given["choices"]] == texts and given["model"] == "lora"
    bare = ask(server, prompt="one two", model="base")
    assert bare["choices"][0]["text"] == server.speaker.answer(["one two"], max_new_tokens=6, raw=True, without=True)[0]
    assert bare["choices"][0]["text"] != texts[0]
    assert [m["id"] for m in server.models()["data"]] == ["lora", "base"]


def test_a_chat_is_a_chat(server: Server) -> None:
    given = ask(server, chat=True, messages=ASKED)["choices"][0]
    assert given["message"] == {"role": "assistant", "content": server.speaker.answer([ASKED], max_new_tokens=6)[0]}


def test_why_an_answer_ended_and_what_it_took(server: Server) -> None:
    whole = ask(server, prompt="one two", max_tokens=4)
    assert whole["usage"]["completion_tokens"] == 4 and whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["total_tokens"] == 4 + len(server.speaker.ids("one two", raw=True))
    text = whole["choices"][0]["text"]
    cut = ask(server, prompt="one two", max_tokens=4, stop=["nowhere", text[1:3]])["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.find(text[1:3])], "stop")
    before, server.ends = server.ends, set(range(4096))
    ended = ask(server, prompt="one two", max_tokens=4)
    server.ends = before
    assert ended["usage"]["completion_tokens"] == 1 and ended["choices"][0]["finish_reason"] == "stop"


def test_seeds(server: Server) -> None:
    def drawn(**fields: Any) -> str:
        return ask(server, prompt="one", temperature=2.0, max_tokens=6, **fields)["choices"][0]["text"]

    assert drawn(seed=3) == drawn(seed=3)
    assert len({drawn(seed=n) for n in range(6)}) > 1


@pytest.mark.parametrize(
    ("chat", "fields", "said"),
    [
        (False, {"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty: this server does not do that: leave it out"),
        (True, {"messages": ASKED, "n": 2}, "n: this server"),
        (True, {"prompt": "a"}, "messages: give this, and no prompt"),
        (False, {"messages": ASKED}, "prompt: give this, and no messages"),
        (False, {"prompt": "a", "temperature": -1}, "temperature: -1.0 is no finite number"),
        (True, {"messages": [{"role": "wizard", "content": "a"}]}, "wizard"),
        (True, {"messages": [{"content": "a"}]}, "messages.0 has no 'role' and 'content': correct that"),
        (True, {"messages": [{"role": "user", "content": None}]}, "messages.0.content is no text"),
        (False, {"prompt": ["a", ""]}, "prompt 1 is empty"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(server: Server, chat: bool, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        ask(server, chat, **fields)
    assert ask(server, prompt="a", user="me", n=1, presence_penalty=0)["choices"]


def test_more_tokens_are_asked_for_than_there_are_positions(server: Server) -> None:
    """No memory is taken for tokens that cannot be."""
    given = ask(server, prompt="a b", temperature=1.0, seed=1, max_tokens=10**12)
    assert given["usage"]["total_tokens"] <= server.speaker.model.config.max_position_embeddings


def test_a_model_that_is_not_served(server: Server) -> None:
    with pytest.raises(NoModel, match="there is no 'lara' here.*lora"):
        ask(server, prompt="a", model="lara")


def test_a_base_alone_has_one_name(place: Path) -> None:
    assert Server(Speaker(str(place / "small")), "small").names == ["small"]


def test_a_stream_says_the_same(server: Server) -> None:
    for chat, fields in ((True, {"messages": ASKED}), (False, {"prompt": ["one", "two"]})):
        answer = ask(server, chat, **fields)
        rows = [line.removeprefix("data: ").strip() for line in streamed(answer)]
        parts = [json.loads(row)["choices"][0] for row in rows[:-1]]
        texts = ["".join(p["delta"].get("content", "") if chat else p["text"] for p in parts if p["index"] == i)
                 for i in range(len(answer["choices"]))]  # fmt: skip
        assert texts == [c["message"]["content"] if chat else c["text"] for c in answer["choices"]]
        assert rows[-1] == "[DONE]" and parts[-1]["finish_reason"] == answer["choices"][-1]["finish_reason"]


def post(at: str, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(at, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [
        sys.executable,
        "-m",
        "luthier",
        "serve",
        str(place / "small"),
        "-d",
        str(place / "lora"),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        yield process.stderr.readline().split()[-1], process
        process.kill()


def test_over_http(running: tuple[str, subprocess.Popen[str]], place: Path) -> None:
    at, process = running
    fields = {"model": "lora", "messages": ASKED, "temperature": 0, "max_tokens": 5}
    code, body = post(f"{at}/chat/completions", json.dumps(fields).encode())
    wanted = Speaker(str(place / "small"), [str(place / "lora")]).answer([ASKED], max_new_tokens=5)[0]
    assert (code, json.loads(body)["choices"][0]["message"]["content"]) == (200, wanted)
    code, body = post(f"{at}/chat/completions", json.dumps(fields | {"stream": True}).encode())
    assert code == 200 and body.startswith("data: {") and body.endswith("data: [DONE]\n\n")
    code, body = post(f"{at}/completions", json.dumps({"prompt": "a", "model": "nought"}).encode())
    assert code == 404 and "there is no 'nought' here" in json.loads(body)["error"]["message"]
    code, body = post(f"{at}/completions", json.dumps({"prompt": "a", "max_tokens": 0}).encode())
    assert code == 400 and json.loads(body)["error"]["message"].startswith("max_tokens: ")
    assert post(f"{at}/completions", b"{")[0] == 400
    with pytest.raises(LuthierError, match="cannot listen at .*: give another --host or --port"):
        serve(str(place / "small"), port=int(at.split(":")[-1].split("/")[0]))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0 and "Traceback" not in (process.stderr.read() if process.stderr else "")
