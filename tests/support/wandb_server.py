"""A server on 127.0.0.1 for the part of wandb's protocol that `wandb sync` and online runs use (wandb 0.31).

It stores the lines of history that a run's charts are drawn from, each at the index that the client gives.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Run = tuple[str, str]
"""Project and id."""


class WandbServer(ThreadingHTTPServer):
    """A context manager: inside it the server answers at `url`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.history: dict[Run, list[dict[str, Any]]] = defaultdict(list)
        self.offsets: list[int] = []
        """Index of the first line of each upload of history, as given by the client."""

    def __enter__(self) -> WandbServer:
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close their connection."""

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """`data` of a GraphQL answer."""
        run = str(variables.get("project")), str(variables.get("name"))
        if "upsertBucket" in query:
            is_new = run not in self.history
            return {"upsertBucket": {"bucket": self._bucket(run), "inserted": is_new}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}}
        if "historyLineCount" in query:  # the query of a resumed online run
            return {"model": {"id": "p", "name": run[0], "entity": {"id": "e", "name": "e"}, "bucket": self._tail(run)}}
        return {}

    def _bucket(self, run: Run) -> dict[str, Any]:
        project = {"id": "p", "name": run[0], "entity": {"id": "e", "name": "e"}}
        names = {"id": run[1], "name": run[1], "displayName": run[1], "description": None, "sweepName": None}
        return names | {"config": "{}", "project": project, "historyLineCount": len(self.history[run])}

    def _tail(self, run: Run) -> dict[str, Any] | None:
        if run not in self.history:
            return None
        last = [json.dumps(row) for row in self.history[run][-1:]]
        tails = {"historyTail": json.dumps(last), "eventsTail": "[]", "eventsLineCount": 0, "logLineCount": 0}
        summary = last[0] if last else "{}"
        return self._bucket(run) | tails | {"summaryMetrics": summary, "wandbConfig": '{"t": {}}', "tags": []}

    def put(self, run: Run, files: dict[str, Any]) -> None:
        """Store the lines of a file stream."""
        if (part := files.get("wandb-history.jsonl")) is not None:
            rows, at = self.history[run], part["offset"]
            self.offsets.append(at)
            rows[at : at + len(part["content"])] = [json.loads(line) for line in part["content"]]


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """GraphQL, and the stream of a run's files."""
        found = json.loads(self._body())
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            answer = {"data": self.server.answer(found["query"], found.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            project, name = self.path.split("/")[-3:-1]
            self.server.put((project, name), found.get("files") or {})
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
