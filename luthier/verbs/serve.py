"""serve: a base with deltas, or an assembly, behind the HTTP interface that OpenAI's clients speak."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from luthier.attach.assembly import Assembly, switch
from luthier.errors import LuthierError, nearest
from luthier.sampling.generate import Sampling, stop_ids
from luthier.sampling.generate import generate as decode
from luthier.verbs.generate import Prompt, Speaker, check_heat, wrong_message

BARE = "base"
"""The model name under which the deltas are switched off; of an assembly, the large model alone."""
HARMLESS = frozenset({"user", "store", "metadata", "stream_options", "service_tier", "parallel_tool_calls"})
"""Fields of a request that change nothing about an answer."""


class NoModel(LuthierError):
    """A request for a model that is not served."""


class Request(BaseModel):
    """A request for completions. Fields that would change the answer and are not among these are refused, not ignored."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    """As OpenAI has it, 1 where it is left out."""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: str | list[str] | None = None
    stream: bool = False


class Server:
    """What answers requests: one model, asked by one request at a time; `name` is the model's name for clients."""

    def __init__(self, speaker: Speaker, name: str, max_new_tokens: int = 256) -> None:
        self.speaker, self.name, self.most, self.lock = speaker, name, max_new_tokens, Lock()
        self.since, self.ends = int(time.time()), stop_ids(speaker.model, speaker.tokenizer)
        handle = None if isinstance(speaker.model, Assembly) else switch(speaker.model)
        self.names = [name] if name == BARE or (handle is not None and not handle.pieces) else [name, BARE]

    def models(self) -> dict[str, Any]:
        """The list of /v1/models."""
        rows = [{"id": n, "object": "model", "created": self.since, "owned_by": "luthier"} for n in self.names]
        return {"object": "list", "data": rows}

    def complete(self, asked: Request, chat: bool) -> dict[str, Any]:
        """The answer to a request as OpenAI's clients read it. Raises LuthierError for what cannot be done."""
        model = asked.model or self.name
        if model not in self.names:
            raise NoModel(f"model: there is no '{model}' here; {nearest(model, self.names, 'model')}")
        ids = [self.speaker.ids(p, raw=not chat) for p in _prompts(asked, chat)]
        most = asked.max_completion_tokens or asked.max_tokens or self.most
        told = self._decoded(ids, most, _sampling(asked), bare=model == BARE and model != self.name)
        choices = []
        for i, tokens in enumerate(told):
            text, why = self._ended(tokens, [asked.stop] if isinstance(asked.stop, str) else asked.stop or [])
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": i, **said, "finish_reason": why})
        read, made = sum(map(len, ids)), sum(map(len, told))
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex[:24]}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
        }

    def _decoded(self, ids: list[list[int]], most: int, sampling: Sampling, bare: bool) -> list[list[int]]:
        """New tokens, with the one that ends an answer."""
        model, tokenizer = self.speaker.model, self.speaker.tokenizer
        with self.lock, switch(model).off() if bare else nullcontext():
            return decode(model, tokenizer, ids, most, stop=self.ends, sampling=sampling, keep_stop=True)

    def _ended(self, told: list[int], stops: Iterable[str]) -> tuple[str, str]:
        """The text, up to the first of the stop strings, and why it ended there."""
        text = self.speaker.tokenizer.decode(told, skip_special_tokens=True)
        cut = min((at for s in stops if s and (at := text.find(s)) >= 0), default=-1)
        whole = bool(told) and told[-1] in self.ends
        return (text[:cut], "stop") if cut >= 0 else (text, "stop" if whole else "length")


def _prompts(asked: Request, chat: bool) -> Sequence[Prompt]:
    """What is asked. Raises LuthierError for a field that would change the answer and is not done here."""
    for field, value in (asked.model_extra or {}).items():
        if field not in HARMLESS and value and (field, value) != ("n", 1):
            raise LuthierError(f"{field}: this server does not do that: leave it out")
    wanted, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if not getattr(asked, wanted) or getattr(asked, other):
        raise LuthierError(f"{wanted}: give this, and no {other}")
    if wrong := wrong_message(asked.messages or []):
        raise LuthierError(f"{wrong}: correct that")
    return [asked.messages or []] if chat else [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt or []


def _sampling(asked: Request) -> Sampling:
    heat = 1.0 if asked.temperature is None else asked.temperature
    check_heat(heat)
    seed = random.randrange(2**31) if asked.seed is None else asked.seed
    return Sampling(heat, 1.0 if asked.top_p is None else asked.top_p, asked.top_k, seed)


def streamed(answer: dict[str, Any]) -> Iterator[str]:
    """An answer as server-sent events: each choice whole in one piece, then how it ended, then [DONE]."""
    chat = answer["object"] == "chat.completion"
    head = {k: answer[k] for k in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    for choice in answer["choices"]:
        said = {"delta": choice["message"]} if chat else {"text": choice["text"]}
        last = {"delta": {}} if chat else {"text": ""}
        for part, reason in ((said, None), (last, choice["finish_reason"])):
            row = {"index": choice["index"], **part, "finish_reason": reason}
            yield f"data: {json.dumps(head | {'choices': [row]}, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


def app(server: Server) -> Any:
    """The FastAPI application: /v1/chat/completions, /v1/completions, /v1/models, /health."""
    try:
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse, StreamingResponse
    except ImportError as e:
        raise LuthierError("serving needs fastapi and uvicorn: pip install 'luthier[serve]'") from e
    made = FastAPI(title="luthier", openapi_url=None)

    def refused(said: str, code: int = 400) -> Any:
        return JSONResponse({"error": {"message": said, "type": "invalid_request_error", "code": None}}, code)

    def sent(answer: dict[str, Any], stream: bool) -> Any:
        return StreamingResponse(streamed(answer), media_type="text/event-stream") if stream else answer

    @made.post("/v1/chat/completions")
    def chat(asked: Request) -> Any:
        return sent(server.complete(asked, chat=True), asked.stream)

    @made.post("/v1/completions")
    def text(asked: Request) -> Any:
        return sent(server.complete(asked, chat=False), asked.stream)

    def invalid(_: Any, e: Any) -> Any:
        first = e.errors()[0]
        return refused(f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}: correct that")

    made.add_exception_handler(LuthierError, lambda _, e: refused(str(e), 404 if isinstance(e, NoModel) else 400))
    made.add_exception_handler(RequestValidationError, invalid)
    made.add_api_route("/health", lambda: {"status": "ok"})
    made.add_api_route("/v1/models", server.models)
    return made


def serve(
    base: Any = "practice",
    deltas: Iterable[Any] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_new_tokens: int = 256,
    say: Any = lambda line: None,
    **fields: Any,
) -> None:
    """Serves a base with deltas, or an assembly, until it is interrupted. Fingerprints, seals and probes are checked first.

    base, deltas, fields: as for `luthier.load`. port: 0 for any free one. name: for clients, default the last folder's.
    max_new_tokens: where a request states none. say: is told the address once requests are taken. A port that is taken, and
    a delta that is not of this base, raise LuthierError before anything is served.
    """
    try:
        import uvicorn
    except ImportError as e:
        raise LuthierError("serving needs fastapi and uvicorn: pip install 'luthier[serve]'") from e
    given = [deltas] if isinstance(deltas, str) else list(deltas)
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except (OSError, OverflowError) as e:
        door.close()
        raise LuthierError(
            f"cannot listen at {host}:{port} ({getattr(e, 'strerror', None) or e}): give another --host or --port"
        ) from e
    with door:
        server = Server(Speaker(base, given, **fields), name or Path(str((given or [base])[-1])).name, max_new_tokens)
        running = uvicorn.Server(uvicorn.Config(app(server), log_level="warning"))
        door.listen()  # from here on requests wait until they are taken
        say(f"serving {', '.join(server.names)} at http://{host}:{door.getsockname()[1]}/v1")
        with suppress(KeyboardInterrupt):  # the usual way to end
            running.run(sockets=[door])
