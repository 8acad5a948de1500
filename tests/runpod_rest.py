"""RunPod's REST API on loopback, made from its OpenAPI document: what the document does not allow, it refuses."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema_rs

KEY = "rpa_secret"
WHEN = "2026-11-27T03:00:00Z"


class RestApi(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, document: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.document: dict[str, Any] = json.loads(document.read_text())
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.calls: list[tuple[str, str]] = []
        self.things: dict[str, dict[str, dict[str, Any]]] = {"templates": {}, "endpoints": {}}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        for template, operations in self.document["paths"].items():
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method.lower() in operations:
                operation: dict[str, Any] = operations[method.lower()]
                return operation
        return None

    def wrong(self, schema: dict[str, Any], content: Any) -> list[str]:
        whole = {**schema, "components": self.document["components"]}
        return [error.message for error in jsonschema_rs.Draft202012Validator(whole).iter_errors(content)]

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        kind = "templates" if path.startswith("/v2/templates") else "endpoints"
        things, rest = self.things[kind], path.split("/")[3:]
        if rest and rest[0] not in things:
            return 404, {"title": "Not Found", "status": 404, "detail": f"{kind} not found"}
        if rest[1:] == ["workers"]:
            return 200, self.workers(rest[0])
        if method == "GET":
            return 200, {kind: list(things.values())} if not rest else things[rest[0]]
        if method == "DELETE":
            if kind == "endpoints":
                self.things["templates"].pop(things[rest[0]].get("templateId", ""), None)
            del things[rest[0]]
            return 204, None
        thing_id = rest[0] if rest else f"{kind[:2]}{len(things) + 1}"
        things[thing_id] = self.made(kind, thing_id, {**things.get(thing_id, {}), **body})
        return 201 if method == "POST" else 200, things[thing_id]

    def made(self, kind: str, thing_id: str, wanted: dict[str, Any]) -> dict[str, Any]:
        if kind == "templates":
            rest: dict[str, Any] = {"args": "", "mounts": {}, "registry": None, "public": False, "category": "NVIDIA"}
            return {**rest, "allowedCudaVersions": [], **wanted, "id": thing_id}
        urls = self.document["components"]["schemas"]["QueueBasedRequestUrls"]["required"]
        made = {"networkVolumes": [], **wanted, "id": thing_id, "createdAt": WHEN}
        made["image"] = self.things["templates"][wanted["templateId"]]["image"]
        made["gpu"] = {**wanted["gpu"], "allowedCudaVersions": [], "minCudaVersion": None}
        if wanted["type"] == "QUEUE":
            return made | {"requestUrls": {url: f"https://api.runpod.ai/v2/{thing_id}/{url}" for url in urls}}
        return made | {"requestUrls": {"base": "https://x.api.runpod.ai", "health": "https://x.api.runpod.ai/ping"}}

    def workers(self, endpoint: str) -> dict[str, Any]:
        summary = dict.fromkeys(("running", "initializing", "throttled", "unhealthy"), 0) | {"idle": 1, "total": 1}
        worker = {"id": "worker7", "status": "IDLE", "isStale": False, "gpuCount": 1, "gpuTypeId": "NVIDIA L40S"}
        return {"workers": [worker], "summary": summary, "endpointVersion": 1}


class _Handler(BaseHTTPRequestHandler):
    server: RestApi

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        self.server.calls.append((self.command, path))
        operation = self.server.operation(self.command, path)
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self._refuse(401, "no such key")
        elif operation is None:
            self._refuse(404, "no such route")
        elif path.endswith("/logs"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            line = {"ts": WHEN, "source": "container", "line": "Container Ready"}
            self.wfile.write(f"id: {WHEN}\ndata: {json.dumps(line)}\n\n".encode())
        else:
            content = operation.get("requestBody", {}).get("content", {})
            wrong = self.server.wrong(content["application/json"]["schema"], body) if content else []
            if wrong:
                self._refuse(422, "the body is not valid", wrong)
                return
            status, answer = self.server.answer(self.command, path, body)
            schema = operation["responses"].get(str(status), {}).get("content", {}).get("application/json")
            if schema is not None:
                assert not self.server.wrong(schema["schema"], answer), (path, answer)
            self._send(status, answer)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _refuse(self, status: int, detail: str, errors: list[str] | None = None) -> None:
        self._send(status, {"title": "Refused", "status": status, "detail": detail, "errors": errors or []})

    def _send(self, status: int, content: Any) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
