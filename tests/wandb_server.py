"""A stand-in for the W&B server on 127.0.0.1, as much of it as sweeps, agents, runs and the public API ask for.

The real server's rules that matter here: a grid hands every cell out once; a run that ends non-zero after it said
``preempting`` is handed out again under its own id; history lines are put at the offset the client names, so that a
repeated request doubles nothing; a run keeps the sweep it began in. Everything is kept in memory, in plain dictionaries
that a test reads. `Server.fail_next` requests are answered with 500, `Server.stop` makes the server vanish,
`Server.start` brings it back on the same port with all it knew.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

KEY = "local-" + "0" * 40
ENTITY, PROJECT = "local", "vit"
SINCE = "2025-01-01T00:00:00Z"
ENDED = {"finished", "failed", "killed", "crashed", "preempted"}


class Server:
    """The server and what it knows. ``runs`` and ``sweeps`` are by id; ``requests`` are (operation or path, body)."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runs: dict[str, dict[str, Any]] = {}
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self.requests: list[tuple[str, Any]] = []
        self.unknown: list[str] = []
        self.fail_next = 0  # requests to answer with 500, once a run has begun
        self.hold_cells = False
        self.port = 0
        self._http: ThreadingHTTPServer | None = None

    def start(self) -> Server:
        server = self

        class Handler(_Handler):
            state = server

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find this server and no other."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_PROJECT": PROJECT,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
        }

    def history(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.runs[run]["history"]]

    def config(self, run: str) -> dict[str, Any]:
        return {key: item["value"] for key, item in self.runs[run]["config"].items() if key != "_wandb"}

    def stop_run(self, run: str) -> None:
        """What the button "Stop run" does."""
        with self.lock:
            self.runs[run]["stopped"] = True

    # GraphQL, by operation

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        method = getattr(self, f"op_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            raise LookupError(f"unknown operation {operation}")
        with self.lock:
            return method(variables)

    def op_Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "u1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams, "email": "",
                           "name": ENTITY, "admin": False, "deletedAt": None, "apiKeys": {"edges": []}}}  # fmt: skip

    op_GetViewer = op_GetDefaultEntity = op_Viewer

    def op_ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def op_UpsertSweep(self, v: dict[str, Any]) -> dict[str, Any]:
        if v.get("id"):
            sweep = next(sweep for sweep in self.sweeps.values() if sweep["name"] == v["id"])
            sweep["state"] = v.get("state") or sweep["state"]
        else:
            document = yaml.safe_load(v["config"])
            name = f"sweep{len(self.sweeps) + 1}"
            sweep = self.sweeps[name] = {
                "name": name, "config": v["config"], "document": document, "state": "PENDING", "method": "grid",
                "project": v["projectName"] or PROJECT, "cells": grid(document), "queue": [],
            }  # fmt: skip
        project = {"name": sweep["project"], "entity": {"name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": sweep["name"], "project": project}, "configValidationWarnings": []}}

    def _sweep(self, name: str) -> dict[str, Any] | None:
        sweep = self.sweeps.get(name)
        if sweep is None:
            return None
        runs = [run for run in self.runs.values() if run["sweep"] == name]
        kept = {key: sweep[key] for key in ("name", "config", "state", "method")}
        return {**kept, "id": name, "displayName": None, "description": None, "bestLoss": None, "createdAt": SINCE,
                "updatedAt": SINCE, "heartbeatAt": SINCE, "runCount": len(runs), "runCountExpected": len(sweep["cells"]),
                "controller": None, "scheduler": None, "earlyStopJobRunning": False, "__typename": "Sweep",
                "runs": {"edges": []}}  # fmt: skip

    def op_SweepWithRuns(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"sweep": self._sweep(v["sweep"])}}

    def op_GetSweep(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"sweep": self._sweep(v["name"])}}

    op_GetSweepLegacy = op_GetSweep

    def op_CreateAgent(self, v: dict[str, Any]) -> dict[str, Any]:
        name = f"agent{len(self.agents) + 1}"
        self.agents[name] = {"sweep": v["sweep"], "runs": []}
        self.sweeps[v["sweep"]]["state"] = "RUNNING"
        return {"createAgent": {"agent": {"id": name}}}

    def op_Heartbeat(self, v: dict[str, Any]) -> dict[str, Any]:
        agent = self.agents[v["id"]]
        running = [run for run, on in json.loads(v["runState"]).items() if on]
        commands: list[dict[str, Any]] = [
            {"type": "stop", "run_id": run} for run in running if self.runs[run]["stopped"]
        ]
        if not running and not self.hold_cells:
            commands.append(self._next_command(agent))
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    def _next_command(self, agent: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[agent["sweep"]]
        if sweep["queue"]:
            run = self.runs[sweep["queue"].pop(0)]
            run["issued"] += 1
        elif sweep["cells"]:
            run = self._run(f"r{len(self.runs) + 1}", sweep["project"], sweep["name"])
            run["args"], run["issued"] = sweep["cells"].pop(0), 1
        else:
            sweep["state"] = "FINISHED"
            return {"type": "exit"}
        agent["runs"].append(run["name"])
        args = {key: {"value": value, "desc": None} for key, value in run["args"].items()}
        return {"type": "run", "run_id": run["name"], "args": args, "program": sweep["document"]["program"]}

    def _run(self, name: str, project: str, sweep: str | None) -> dict[str, Any]:
        run = self.runs.get(name)
        if run is None:
            run = self.runs[name] = {
                "name": name, "project": project, "sweep": sweep, "state": "pending", "history": [], "events": [],
                "config": {}, "summary": {}, "tags": [], "displayName": name, "group": None, "jobType": None,
                "exitcode": None, "preempting": False, "stopped": False, "files": {}, "issued": 0, "starts": 0,
                "uploaded": [],
            }  # fmt: skip
        return run

    def op_UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        inserted = v["name"] not in self.runs or not self.runs[v["name"]]["starts"]
        run = self._run(v["name"], v.get("project") or PROJECT, v.get("sweep"))
        run["sweep"] = run["sweep"] or v.get("sweep")
        for key, given in (("displayName", "displayName"), ("groupName", "group"), ("jobType", "jobType")):
            if v.get(key):
                run[given] = v[key]
        if v.get("tags") is not None:
            run["tags"] = v["tags"]
        if v.get("config"):
            run["config"] = json.loads(v["config"])
        if v.get("summaryMetrics"):
            run["summary"] = json.loads(v["summaryMetrics"])
        if inserted or run["state"] in ENDED | {"pending"}:
            run["starts"] += 1
            run["state"], run["preempting"], run["exitcode"] = "running", False, None
        project = {"id": "p1", "name": run["project"], "entity": {"id": "e1", "name": ENTITY}}
        bucket = {
            "id": f"storage-{run['name']}", "name": run["name"], "displayName": run["displayName"], "description": "",
            "config": json.dumps(run["config"]), "sweepName": run["sweep"], "project": project,
            "historyLineCount": len(run["history"]),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def op_RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        bucket = None
        if run is not None and run["starts"]:
            bucket = {
                "id": f"storage-{run['name']}", "name": run["name"], "summaryMetrics": json.dumps(run["summary"]),
                "displayName": run["displayName"], "logLineCount": 0, "historyLineCount": len(run["history"]),
                "eventsLineCount": len(run["events"]), "historyTail": json.dumps(run["history"][-1:]),
                "eventsTail": json.dumps(run["events"][-1:]), "config": json.dumps(run["config"]), "tags": run["tags"],
                "notes": None, "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
        return {"model": {"id": "p1", "name": PROJECT, "entity": {"id": "e1", "name": ENTITY}, "bucket": bucket}}

    def op_CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": f"storage-{v['run']}", "uploadHeaders": [], "files": files}}

    # the public API

    def _node(self, run: dict[str, Any]) -> dict[str, Any]:
        steps = [json.loads(line)["_step"] for line in run["history"]]
        return {
            "id": f"storage-{run['name']}", "projectId": "1", "name": run["name"], "displayName": run["displayName"],
            "tags": run["tags"], "sweepName": run["sweep"], "state": run["state"], "group": run["group"],
            "jobType": run["jobType"], "commit": None, "readOnly": False, "createdAt": SINCE, "heartbeatAt": SINCE,
            "description": None, "notes": None, "systemMetrics": "{}", "config": json.dumps(run["config"]),
            "summaryMetrics": json.dumps(run["summary"]), "historyLineCount": len(run["history"]),
            "user": {"name": ENTITY, "username": ENTITY},
            "historyKeys": {"lastStep": max(steps, default=-1), "keys": {}, "sets": []},
        }  # fmt: skip

    def op_Run(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        return {"project": {"run": self._node(run) if run and run["project"] == v["project"] else None}}

    def op_Runs(self, v: dict[str, Any]) -> dict[str, Any]:
        filters = json.loads(v["filters"] or "{}")
        wanted = {key: value for part in filters.get("$and", [filters]) for key, value in part.items()}
        runs = [
            run
            for run in self.runs.values()
            if run["project"] == v["project"] and all(run[key] == value for key, value in wanted.items())
        ]
        first, count = int(v.get("cursor") or 0), v.get("perPage") or 50
        page = runs[first : first + count]
        edges = [{"node": self._node(run), "cursor": str(first + k + 1)} for k, run in enumerate(page)]
        info = {"endCursor": str(first + len(page)), "hasNextPage": first + len(page) < len(runs)}
        return {"project": {"internalId": "1", "runCount": len(runs), "readOnly": False,
                            "runs": {"edges": edges, "pageInfo": info}}}  # fmt: skip

    def op_RunHistoryKeys(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"historyKeys": self._node(self.runs[v["name"]])["historyKeys"]}}}

    def op_RunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[v["name"]]
        found = {name: data for name, data in run["files"].items() if not v["fileNames"] or name in v["fileNames"]}
        edges = [
            {
                "node": {
                    "id": name, "name": name, "url": f"{self.url}/storage/{run['name']}/{name}", "directUrl": "",
                    "sizeBytes": str(len(data)), "mimetype": "", "updatedAt": SINCE,
                    "md5": base64.b64encode(hashlib.md5(data).digest()).decode(),
                },
                "cursor": str(k),
            }
            for k, (name, data) in enumerate(found.items(), 1)
        ]  # fmt: skip
        info = {"endCursor": str(len(edges)), "hasNextPage": False}
        return {"project": {"internalId": "1", "run": {"fileCount": len(edges),
                                                       "files": {"edges": edges, "pageInfo": info}}}}  # fmt: skip

    def op_HistoryPage(self, v: dict[str, Any]) -> dict[str, Any]:
        lines = [
            line for line in self.runs[v["run"]]["history"] if v["minStep"] <= json.loads(line)["_step"] < v["maxStep"]
        ]
        return {"project": {"run": {"history": lines}}}

    # reports, which W&B calls views

    def op_ProjectViews(self, v: dict[str, Any]) -> dict[str, Any]:
        edges = [{"node": view, "cursor": str(k)} for k, view in enumerate(self.views, 1)]
        return {"project": {"allViews": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}}

    def op_GetProjects(self, v: dict[str, Any]) -> dict[str, Any]:
        project = {"__typename": "Project", "id": "p1", "name": PROJECT, "entityName": ENTITY, "createdAt": SINCE,
                   "isBenchmark": False, "user": None}  # fmt: skip
        info = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"edges": [{"node": project}], "pageInfo": info}}

    def op_ProjectInternalId(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "p1", "internalId": "1"}}

    def op_upsertView(self, v: dict[str, Any]) -> dict[str, Any]:
        view = next((view for view in self.views if view["id"] == v["id"]), None)
        inserted = view is None
        if view is None:
            view = {"id": f"view{len(self.views) + 1}", "user": {"username": ENTITY}}
            self.views.append(view)
        view |= {key: v[key] for key in ("name", "displayName", "description", "type", "spec")}
        view |= {"project": {"id": "p1", "name": PROJECT, "entityName": ENTITY}, "createdAt": SINCE, "updatedAt": SINCE}
        return {"upsertView": {"view": view, "inserted": inserted}}

    # what is not GraphQL

    def stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The file stream of a run: lines at offsets, the summary, how it ended."""
        with self.lock:
            run = self.runs[name]
            for file, part in (body.get("files") or {}).items():
                if file == "wandb-summary.json":
                    run["summary"] = json.loads(part["content"][-1])
                    continue
                lines = {"wandb-history.jsonl": run["history"], "wandb-events.jsonl": run["events"]}.get(file)
                if lines is not None:
                    offset = part["offset"]
                    assert offset <= len(lines), f"{name}: a hole in {file}: {len(lines)} lines, the next at {offset}"
                    lines[offset : offset + len(part["content"])] = part["content"]
            run["uploaded"] += body.get("uploaded") or []
            run["preempting"] = run["preempting"] or bool(body.get("preempting"))
            if body.get("complete"):
                self._end(run, body.get("exitcode"))
            return {"stopped": run["stopped"]}

    def _end(self, run: dict[str, Any], code: int) -> None:
        run["exitcode"] = code
        if code == 0:
            run["state"] = "finished"
        elif run["stopped"]:
            run["state"] = "killed"
        elif run["preempting"]:
            run["state"] = "preempted"
            if run["sweep"] in self.sweeps and run["issued"]:
                self.sweeps[run["sweep"]]["queue"].append(run["name"])
        else:
            run["state"] = "failed"


def grid(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a grid sweep, as the server expands them."""
    axes = {key: spec.get("values", [spec.get("value")]) for key, spec in document["parameters"].items()}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


class _Handler(BaseHTTPRequestHandler):
    state: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        path = urlsplit(self.path).path
        if path.endswith("/graphql"):
            found = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            operation = found[1] if found else ""
            if not self._serves(operation, body.get("variables")):
                return
            try:
                data = self.state.answer(operation, body.get("variables") or {})
            except LookupError as error:
                self._send(200, {"errors": [{"message": str(error)}], "data": None})
                return
            self._send(200, {"data": data})
        elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            if self._serves("file_stream", body):
                self._send(200, self.state.stream(match[1], body))
        else:
            self._send(404, {})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, _, run, name = unquote(urlsplit(self.path).path).split("/", 3)
        if self._serves("PUT", name):
            self.state.runs[run]["files"][name] = data
            self._send(200, {})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).split("/", 3)
        if not self._serves("GET", self.path):
            return
        if len(parts) == 4 and parts[1] == "storage" and parts[3] in self.state.runs[parts[2]]["files"]:
            self._send(200, self.state.runs[parts[2]]["files"][parts[3]])
        else:
            self._send(404, {})

    def _serves(self, what: str, body: Any) -> bool:
        """Notes the request; while the server fails, answers 500 instead."""
        with self.state.lock:
            self.state.requests.append((what, body))
            failing = self.state.fail_next > 0 and any(run["starts"] for run in self.state.runs.values())
            self.state.fail_next -= failing
        if failing:
            self._send(500, {})
        return not failing

    def _send(self, code: int, content: dict[str, Any] | bytes) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    server = Server().start()
    print("\n".join(f"export {key}={value}" for key, value in server.environment.items()))
    sys.stdout.flush()
    threading.Event().wait()
