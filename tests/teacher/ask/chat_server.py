"""An OpenAI-compatible server that answers by rule and misbehaves on request. A program:

    python chat_server.py LOG [--faults=429,500,...] [--delay=SECONDS]

It prints its port, and appends a JSON line per request that it read to LOG: prompt, status, most
tokens. What it does to a prompt for the first time is decided by a hash of the prompt among the
faults; the second time it answers. Faults: 429 (with Retry-After), 500, slow (no answer in time),
broken (a body that ends early), html (200, and no JSON), cut (finish_reason length until the most
tokens are over 200), 400 (always), 401, empty (no choices).
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import http.server
import json
import threading
import time

WORDS = 8  # tokens of an answer, as this server counts


def score(prompt: str, place: int) -> float:
    """What this server's LLM thinks of the candidate at a place: two digits, by hash."""
    digest = hashlib.sha256(f"{prompt}|{place}".encode()).digest()
    return round(digest[0] / 256, 2)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, log, faults, delay):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log, self.faults, self.delay = log, faults, delay
        self.lock = threading.Lock()
        self.times = collections.Counter()

    def fault_of(self, prompt):
        """(fault or "", how often the prompt came before)."""
        with self.lock:
            before = self.times[prompt]
            self.times[prompt] += 1
        number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
        fault = self.faults[number % len(self.faults)] if self.faults else ""
        return fault, before

    def note(self, **facts):
        with self.lock, open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body, *, headers=(), kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        most = body.get("max_tokens") or body.get("max_completion_tokens")
        fault, before = self.server.fault_of(prompt)
        first = before == 0
        time.sleep(self.server.delay)
        errors = {
            "400": (400, {"error": {"message": "unknown field response_format"}}, True),
            "401": (401, {"error": {"message": "wrong key"}}, True),
            "429": (429, {"error": {"message": "slow down"}}, first),
            "500": (500, {"error": {"message": "restarting"}}, first),
        }
        status, answer, now = errors.get(fault, (200, None, False))
        if now:
            self.server.note(prompt=prompt, status=status, most=most)
            self.send(status, answer, headers=[("Retry-After", "0.05")] if status == 429 else [])
            return
        self.answer(body, prompt, most, fault if first or fault == "empty" else "", fault == "cut")

    def answer(self, body, prompt, most, fault, cuts):
        labels = list(body["response_format"]["json_schema"]["schema"]["properties"])
        text = json.dumps({name: score(prompt, place) for place, name in enumerate(labels)})
        cut = cuts and most <= 200
        reply = {
            "object": "chat.completion",
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text[:5] if cut else text},
                    "finish_reason": "length" if cut else "stop",
                }
            ],
            "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": WORDS},
        }
        if fault == "empty":
            reply["choices"] = []
        if fault == "slow":
            self.server.note(prompt=prompt, status="slow", most=most)
            time.sleep(1.5)
            self.close_connection = True
            return
        if fault == "broken":
            self.server.note(prompt=prompt, status="broken", most=most)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "10000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return
        if fault == "html":
            self.server.note(prompt=prompt, status="html", most=most)
            self.send(200, b"<html>busy</html>", kind="text/html")
            return
        self.server.note(prompt=prompt, status="cut" if cut else 200, most=most)
        self.send(200, reply)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    parser.add_argument("--faults", default="")
    parser.add_argument("--delay", type=float, default=0.0)
    given = parser.parse_args()
    faults = given.faults.split(",") if given.faults else []
    server = Server(given.log, faults, given.delay)
    print(server.server_address[1], flush=True)
    server.serve_forever()
