"""A run that is tracked by the real wandb while something befalls it: its process is killed or
frozen, the server goes away, or has the beginning of the run already. Prints what the user would
be told, how long each part took, and the points that came to the server.

    python -m tests.lab.wandb_run FOLDER kill|freeze|vanish|again|nothing
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from specdec.lab import tracking, wandb_tracker
from specdec.lab.tracking import Careful, TrackedRun
from specdec.lab.wandb_tracker import WandbTracker
from tests.lab.test_curves import steps

SUMMARY = {"steps": 100, "mean_accepted_length": {"pooled": 2.5}, "acceptance_by_depth": [0.5]}
BUCKET = {"id": "b", "name": "r", "displayName": "x", "config": "{}", "historyLineCount": 0}
BUCKET |= {"project": {"id": "p", "name": "specdec", "entity": {"id": "e", "name": "me"}}}
# What a server that has nothing yet says, by the name of the question.
ANSWERS: dict[str, Any] = {
    "Viewer": {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}},
    "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
}


KNOWN = {"steps": 40, "tokens": 99}
TAIL = json.dumps([json.dumps({"_step": 39, "steps": 40})])
BEGUN = {**BUCKET, "summaryMetrics": json.dumps(KNOWN), "historyTail": TAIL, "tags": []}
BEGUN |= {"historyLineCount": 40, "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
BEGUN |= {"wandbConfig": '{"t": 1}'}
AGAIN = {"model": {"bucket": BEGUN, "entity": {"name": "me"}, "name": "specdec"}}
HISTORY = "wandb-history.jsonl"
came: list[dict[str, Any]] = []  # points


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        record = json.loads(asked) if asked[:1] == b"{" else {}
        lines = record.get("files", {}).get(HISTORY, {}).get("content", ())
        came.extend(json.loads(line) for line in lines)
        said = json.dumps({"data": ANSWERS.get(record.get("operationName", ""), {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


def serve() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
    return server


def process_of_wandb() -> int:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        name, rest = path.read_text().rpartition(")")[::2]
        if "wandb" in name and int(rest.split()[1]) == os.getpid():
            found.append(int(path.parent.name))
    (pid,) = found
    return pid


def main(folder: Path, event: str) -> None:
    tracking.END = wandb_tracker.FINISH + 4.0
    if event == "again":
        ANSWERS["RunResumeStatus"] = AGAIN
    server = serve() if event in ("vanish", "again") else None
    took: dict[str, float] = {}
    said: list[str] = []
    careful = Careful(WandbTracker(every=1), said.append)

    def timed(name: str, work: Any) -> None:
        begun = time.perf_counter()
        work()
        took[name] = time.perf_counter() - begun

    timed("start", lambda: careful.start(TrackedRun(folder=folder, id="r", name="x")))
    if server is not None and event == "vanish":
        server.shutdown()
        server.server_close()
    elif event in ("kill", "freeze"):
        os.kill(process_of_wandb(), signal.SIGKILL if event == "kill" else signal.SIGSTOP)
    timed("steps", lambda: [careful.step(step) for step in steps(100)])
    timed("finish", lambda: careful.finish(SUMMARY, []))
    shown = [point["steps"] for point in came if "steps" in point]
    print(json.dumps({"said": said, "took": took, "at": time.time(), "points": shown}))


if __name__ == "__main__":
    wandb_tracker.INIT, wandb_tracker.FINISH = 3, 3
    main(Path(sys.argv[1]), sys.argv[2])
