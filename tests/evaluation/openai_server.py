"""A server that answers as an OpenAI endpoint does, in a process of its own: `python openai_server.py LOG [KEY]`.

It prints its port. The name of the model in a request decides what it does; LOG gets a line of JSON per request.
"""

import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOG, KEY = sys.argv[1], (sys.argv[2:] or [None])[0]
SEEN: dict = {}
LOCK = threading.Lock()


def chat(text, **more):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text, **more}, "finish_reason": "stop"}]}


def error(status, message, code=None):
    return status, {"error": {"message": message, "code": code}}


def longer(first, second):
    return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def answer(model, first, second, number):
    """(status, body) of the request that comes for the `number`-th time with the same content."""
    fails = {"busy": 429, "broken": 500, "overloaded": 503}
    if model in fails and number < 3:
        return error(fails[model], "try again")
    if model == "malformed" and number < 2:
        return 200, '{"choices": [{"mess'
    if model == "empty" and number < 2:
        return 200, {"choices": []}
    if model == "slow" and number < 2:
        time.sleep(1.5)
    kinds = {
        "down": error(500, "always"),
        "poor": error(429, "You exceeded your current quota", "insufficient_quota"),
        "filtered": error(400, "The response was filtered", "content_filter"),
        "short": error(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded"),
        "strict": error(400, f"Unsupported parameter; your key is {KEY}"),
        "silent": chat("I can't say."),
        "refusing": chat(None, refusal="I won't."),
        "first": chat("Both are fine, but [[A]] it is."),
    }
    return kinds.get(model) or chat(f"Not [[C]]. [[{longer(first, second)}]]")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        known = ["longer", "busy", "first"]
        self.send(*((200, {"data": [{"id": name} for name in known]}) if self.allowed() else error(401, "no")))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, model = body["messages"][-1]["content"], body["model"]
        first, second = re.findall(r"<answer [AB]>\n(.*?)\n</answer", text, re.DOTALL)
        with LOCK:
            number = SEEN[model, text] = SEEN.get((model, text), 0) + 1
            with open(LOG, "a") as log:
                log.write(json.dumps({"body": body, "first": first, "second": second, "number": number}) + "\n")
        if not self.allowed():
            return self.send(*error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}"))
        if model == "trickle" and number < 2:
            return self.trickle()
        if model == "cut" and number < 2:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return self.wfile.write(b'{"choices"')
        return self.send(*answer(model, first, second, number))

    def allowed(self):
        return KEY is None or self.headers.get("Authorization") == f"Bearer {KEY}"

    def trickle(self):
        """A byte now and then, for ever: no read times out."""
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass

    def send(self, status, body):
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:  # the client did not wait
            pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
