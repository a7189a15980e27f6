"""A writer of hindsight that is right: rules in the place of a large model, at an OpenAI-compatible endpoint.

    python -m benchmarks.hindsight_rules --port 8123

It reads where things were picked up in an episode of ALFWorld ("take mug 1 from shelf 2") and says so in the words of
the quick start's skills ("mug in shelf ."), as the lesson, and as the hint for every turn before that; of an episode
that found nothing it has nothing to say. With it the hindsight methods of docs/study.md run on a policy that writes no
prose:

    sdar.context.writer.source=endpoint sdar.context.writer.model=rules
    sdar.context.writer.url=http://127.0.0.1:8123/v1
"""

from __future__ import annotations

import argparse
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TURN = re.compile(r"^Turn (\d+)\.", re.MULTILINE)
TAKEN = re.compile(r"done: take (\w+) \d+ from (\w+) \d+$", re.MULTILINE)
NOTED = re.compile(r"\w+ in \w+ \.")


def found(story: str) -> dict[str, int]:
    """What was learned of places -> the turn that showed it, from 1."""
    _, *parts = TURN.split(story)
    seen: dict[str, int] = {}
    for number, turn in zip(parts[::2], parts[1::2], strict=True):
        if taken := TAKEN.search(turn):
            seen.setdefault(f"{taken[1]} in {taken[2]} .", int(number))
    return seen


def answer(prompt: str) -> str:
    """To a prompt of sdar_verl.context.hindsight: its JSON object where it asks for one, else the lines alone."""
    seen = found(prompt)
    if "JSON" not in prompt:
        return "\n".join(seen or dict.fromkeys(NOTED.findall(prompt)))
    last = max(seen.values(), default=0)
    hints = [{"turn": turn, "hint": "\n".join(n for n in seen if turn <= seen[n])} for turn in range(1, last + 1)]
    return json.dumps({"summary": "", "lesson": "\n".join(seen), "hints": hints})


class Writer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = answer(asked["messages"][-1]["content"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": {"total_tokens": len(text.split())}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, connections that come at the same time are dropped
    daemon_threads = True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    with Server(("127.0.0.1", parser.parse_args().port), Writer) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
