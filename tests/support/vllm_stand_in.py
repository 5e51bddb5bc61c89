"""A server on the loopback interface that answers as vLLM's does, from a tiny model.

It loads and forgets LoRA adapters and samples each request by itself, so that an answer hangs on
the request alone. A test may make it slow, silent or rude, or let it die in the middle of a step.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine

# Several servers of one process compute one after the other.
_COMPUTES = threading.Lock()


class StandIn:
    """One server.

    Args:
        folder: of the model, which gives the server's model its name.
        port: 0 takes a free one.

    Attributes:
        adapters: names of those that are loaded.
        asked: (path, body) of every request, in order.
        lives: so many completions are still answered; then it dies. None: all.
        replies: path -> (status, text) that it answers instead of what was asked for.
        delay: seconds that a completion takes at least.
        spoil: changes a completion before it is sent.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder = folder
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lives: int | None = None
        self.replies: dict[str, tuple[int, str]] = {}
        self.delay = 0.0
        self.spoil: Any = None
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._base = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._models: dict[str, TransformersEngine] = {}
        self._connections: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer._connections.append(self.connection)

            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict[str, Any]) -> None:
                path = self.path.removeprefix("/v1/")
                outer.asked.append((path, body))
                if path == "completions" and outer.lives is not None:
                    outer.lives -= 1
                    if outer.lives < 0:
                        outer.die()
                        return
                status, text = outer.replies.get(path) or outer.answer(path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # of a client that has left, or after this server's death

        self._http = Quiet(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def adapters(self) -> list[str]:
        return list(self._models)

    def die(self) -> None:
        """Stop at once, with requests under way."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._connections:
            with suppress(OSError):  # the client has closed it
                connection.shutdown(socket.SHUT_RDWR)

    def count(self, path: str) -> int:
        """How many requests there were."""
        return sum(asked == path for asked, _ in self.asked)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        match path:
            case "models":
                entries = [{"id": str(self.folder), "parent": None, "max_model_len": 256}]
                entries += [{"id": n, "parent": str(self.folder)} for n in self._models]
                return 200, json.dumps({"object": "list", "data": entries})
            case "load_lora_adapter":
                name, folder = body["lora_name"], Path(body["lora_path"])
                if name in self._models:
                    return 400, f"The lora adapter '{name}' has already been loaded."
                if not folder.is_dir():
                    return 404, f"No adapter found for {folder}"
                # Making an adapter takes random numbers, which are not this server's.
                with _COMPUTES, torch.random.fork_rng():
                    model = peft.PeftModel.from_pretrained(deepcopy(self._base), folder).eval()
                    self._models[name] = TransformersEngine(model, self._tokenizer)
                return 200, f"Success: LoRA adapter '{name}' added successfully."
            case "unload_lora_adapter":
                if self._models.pop(body["lora_name"], None) is None:
                    return 404, "cannot be found"
                return 200, "Success"
            case "completions":
                return self._complete(body)
        return 404, "Not Found"

    def _complete(self, body: dict[str, Any]) -> tuple[int, str]:
        engine = self._models.get(body["model"])
        if engine is None and body["model"] != str(self.folder):
            return 404, f"The model `{body['model']}` does not exist."
        if engine is None:
            engine = TransformersEngine(self._base, self._tokenizer)
        params = SamplingParams(
            temperature=body["temperature"],
            max_new_tokens=body["max_tokens"],
            seed=body["seed"],
            top_k=body["top_k"],
            top_p=body["top_p"],
            min_p=body["min_p"],
        )
        time.sleep(self.delay)
        with _COMPUTES:
            ((rollout,),) = engine.generate([body["prompt"]], group_size=1, params=params)
        choice = _choice(rollout)
        if self.spoil is not None:
            self.spoil(choice)
        return 200, json.dumps({"choices": [choice]})


def _choice(rollout: Rollout) -> dict[str, Any]:
    return {
        "text": rollout.text,
        "token_ids": rollout.token_ids,
        "logprobs": {"token_logprobs": rollout.logprobs},
        "finish_reason": "stop" if rollout.finished else "length",
    }
