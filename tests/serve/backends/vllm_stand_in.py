"""A server with vLLM's command line, paths and forms, for tests: it answers with words, and dies when asked to."""

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOG = Path(os.environ["STAND_IN_LOG"])


def note(what: str, value: object) -> None:
    with LOG.open("a") as file:
        file.write(json.dumps({what: value}) + "\n")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass

    def say(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.say(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note("asked", {"path": self.path, "body": body})
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.say(401, {"error": "Unauthorized"})
            return
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if said == "die":
            os._exit(3)
        if said == "refuse":
            error = {"message": "no such thing", "type": "BadRequestError", "param": "tools", "code": 400}
            self.say(400, {"error": error})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for chunk in self.chat(said, body) if "messages" in body else self.text(said, body):
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            note("left", said)

    def chat(self, said: str, body: dict):
        def chunk(delta: dict, reason: str | None = None, index: int = 0) -> dict:
            return {"id": "x", "choices": [{"index": index, "delta": delta, "finish_reason": reason}]}

        if said == "forever":
            for number in range(10_000):
                yield chunk({"content": f"{number} "})
                time.sleep(0.01)
        if said == "think":
            yield chunk({"content": "<th"})
            yield chunk({"content": "ink>one two</think>three"}, "stop")
        elif said == "think apart":
            yield chunk({"reasoning": "one two"})
            yield chunk({"content": "three"}, "stop")
        elif said == "call":
            call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
            yield chunk({"tool_calls": [call]})
            for part in ('{"a": ', "1}"):
                yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
            yield chunk({}, "tool_calls")
        else:
            for index in range(body.get("n", 1)):
                yield chunk({"role": "assistant", "content": ""}, index=index)
                yield chunk({"content": f"you said {said}"}, index=index)
                yield chunk({}, "stop", index)
        if said != "uncounted":
            details = {"cached_tokens": 2}
            used = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": details}
            yield {"id": "x", "choices": [], "usage": used}

    def text(self, said: str, body: dict):
        choice = {"index": 0, "text": f"{said} and on", "logprobs": None, "finish_reason": "length"}
        yield {"id": "x", "choices": [choice]}
        yield {"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--fails", action="store_true")
    given = parser.parse_args()
    note("started", {"pid": os.getpid(), **vars(given)})
    if given.fails:
        sys.exit("ValueError: this model is not for me")
    ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
