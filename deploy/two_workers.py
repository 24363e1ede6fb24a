#!/usr/bin/env python3
"""Two workers behind a router, on one machine: the recipe of deploy/README.md, and what it promises, checked.

    python3 deploy/two_workers.py [--treespark PROGRAM] [--venv FOLDER]

Starts two `treespark serve` on the CPU and `sglang-router` in front, at free ports of this machine. Asks the workers and
the router for the same answers, whole and streamed; kills one worker, starts it again, and has one drain. The first run
installs the router. Ends with 0 if all that was checked held; else the ends of all logs are printed.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREESPARK = HERE.parent / "target/release/treespark"
VENV = HERE.parent / "target/deploy-venv"
MODEL = "smollm2-135m-instruct"
KEY = "checked-by-the-workers"
# Seconds. A machine may be busy with other things.
PATIENCE = 120
# They share no beginning, so nothing but load says which worker should have them.
QUESTIONS = ["Why is the sky blue?", "Name three rivers.", "What do bees eat?", "Who was Ada Lovelace?"]
PREFIX = "You are a patient teacher of small children. Use short words, be kind, and be brief. "


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--treespark", default=TREESPARK, type=Path)
    options.add_argument("--venv", default=VENV, type=Path, help="made if it is not there")
    options = options.parse_args()
    python = environment(options.venv)
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            check(Fleet(options.treespark, python, logs, stack))
        except BaseException:
            for log in sorted(logs.iterdir()):
                print(f"-- {log.name}:", *log.read_text(errors="replace").splitlines()[-20:], sep="\n", file=sys.stderr)
            raise
    print(f"all held, in {time.monotonic() - begin:.0f} s")


def environment(folder):
    """The Python of a virtual environment that holds requirements.txt."""
    python, wanted, installed = folder / "bin/python", HERE / "requirements.txt", folder / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", wanted], check=True)
        installed.write_text(wanted.read_text())
    return python


class Fleet:
    """Two workers and the router, running."""

    def __init__(self, treespark, python, logs, stack):
        self.treespark, self.logs, self.stack = treespark, logs, stack
        *ports, self.router, self.router_metrics = free_ports(4)
        self.workers = {port: self.start_worker(port) for port in ports}
        router = self.start("router", {"NO_COLOR": "1"}, [
            python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", self.router,
            "--policy", "cache_aware",
            # A dead worker is known after a second or so; a request that met it is tried again for longer than that.
            "--health-check-interval-secs", 1, "--health-failure-threshold", 1, "--health-success-threshold", 1,
            "--retry-max-retries", 6, "--retry-initial-backoff-ms", 250,
            # It would count the mistakes of clients (400, 404) against the worker that points them out.
            "--disable-circuit-breaker",
            "--worker-startup-check-interval", 1, "--log-level", "warn",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", self.router_metrics,
        ])
        for port, worker in [*self.workers.items(), (self.router, router)]:
            wait("it listens", lambda: get(port, "/health")[0] is not None, worker)
        for port in ports:
            status, said = post(self.router, "/workers", {"url": f"http://127.0.0.1:{port}", "model_id": MODEL})
            assert status == 202, said
        wait("the router has both workers", lambda: self.healthy() == 2, router)

    def start(self, name, environment, command):
        with open(self.logs / name, "ab") as log:
            process = subprocess.Popen([str(word) for word in command], env=os.environ | environment,
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.stack.callback(end, process)
        return process

    def start_worker(self, port):
        return self.start(f"worker-{port}", {"TREESPARK_API_KEY": KEY}, [
            self.treespark, "serve", "--backend", "cpu", "--port", port, "--max-requests", 2, "--context", 1024,
        ])

    def healthy(self):
        """Workers that the router would ask."""
        return json.loads(get(self.router, "/readiness")[1]).get("healthy_workers", 0)

    def asked(self, act):
        """What `act` gives, how many requests each worker had meanwhile, and how many tokens lay in a cache."""
        names = ["treespark_requests_total", "treespark_cached_tokens_total"]
        before = [[metrics(port)[name] for name in names] for port in self.workers]
        result = act()
        after = [[metrics(port)[name] for name in names] for port in self.workers]
        requests, cached = zip(*[[int(b - a) for a, b in zip(*pair)] for pair in zip(before, after)])
        return result, list(requests), sum(cached)


def check(fleet):
    workers, router = fleet.workers, fleet.router
    listed = [model["id"] for model in json.loads(get(router, "/v1/models")[1])["data"]]
    assert listed == [MODEL], listed
    done(f"two workers and a router run; the router lists {MODEL}")

    expected = {}
    for temperature in (0, 0.8):
        request = ask(QUESTIONS[0], temperature=temperature)
        texts = [whole(port, request) for port in (*workers, router)]
        streams = [list(stream(port, request)) for port in (*workers, router)]
        assert len({*texts, *("".join(pieces) for pieces in streams)}) == 1, (texts, streams)
        assert min(map(len, streams)) > 1, f"a stream came in one piece: {streams}"
        expected[temperature] = texts[0]
    done(f"equal seeds, equal texts from both workers and through the router, whole and streamed, 12 of 12: {texts[0]!r}")

    status, said = post(router, "/v1/chat/completions", ask("Hi"), key="wrong")
    assert status == 401 and "API key" in said, (status, said)
    # More of them than would open the router's circuit breakers of both workers.
    for _ in range(24):
        status, said = post(router, "/v1/chat/completions", ask("Hi", model="another"))
        assert status == 404 and "no model 'another'" in said, (status, said)
    assert whole(router, ask(QUESTIONS[0])) == expected[0]
    done("a wrong key is refused; 24 bad requests in a row shut nobody out")

    with concurrent.futures.ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = lambda: list(pool.map(lambda question: whole(router, ask(question)), QUESTIONS))
        _, spread, _ = fleet.asked(answers)
    assert sum(spread) == len(QUESTIONS) and min(spread) > 0, spread
    one_prefix = lambda: [whole(router, ask(PREFIX + question)) for question in QUESTIONS]
    _, together, cached = fleet.asked(one_prefix)
    assert sorted(together) == [0, len(QUESTIONS)] and cached > 0, (together, cached)
    done(f"4 requests at once were spread {spread[0]} + {spread[1]}; 4 of one prefix went to one worker, "
         f"where {cached} of their tokens lay in the cache")

    page = get(fleet.router_metrics, "/metrics")[1]
    assert "smg_router_requests_total" in page and "smg_worker_health" in page, page
    # Whoever scales by a metric needs it to be there.
    manifests = "".join(file.read_text() for file in (HERE / "kubernetes/metrics").iterdir())
    unknown = set(re.findall(r"\btreespark_\w+", manifests)) - metrics(next(iter(workers))).keys()
    assert not unknown, unknown
    done("/metrics of the workers and of the router are read, and have all that kubernetes/metrics/ asks for")

    _, requests, _ = fleet.asked(lambda: whole(router, ask(QUESTIONS[0])))
    dead = list(workers)[requests.index(1)]
    workers[dead].kill()
    begin = time.monotonic()
    texts = [whole(router, ask(QUESTIONS[0]))]
    first = time.monotonic() - begin
    texts += [whole(router, ask(QUESTIONS[0])), "".join(stream(router, ask(QUESTIONS[0])))]
    assert set(texts) == {expected[0]}, texts
    done(f"the worker that had the last request was killed; the next 3 were answered by the other, the first in {first:.1f} s")
    workers[dead] = fleet.start_worker(dead)
    wait("the worker is back", lambda: fleet.healthy() == 2, workers[dead])
    done("it was started again, and the router took it back")

    long = ask(QUESTIONS[1], temperature=0.8, max_tokens=128, ignore_eos=True)
    reference = whole(dead, long)
    pieces = stream(router, long)
    text = next(pieces)
    busy = [port for port in workers if metrics(port)["treespark_running_requests"]]
    assert len(busy) == 1, f"of an answer that has begun, {busy} run: it came whole, or was too quick for this check"
    leaving = busy[0]
    workers[leaving].send_signal(signal.SIGTERM)
    assert text + "".join(pieces) == reference
    assert workers[leaving].wait(PATIENCE) == 0
    assert whole(router, ask(QUESTIONS[0])) == expected[0]
    done("a worker was told to stop amid a stream: the stream came to its end, and the next request went to the other")


def ask(question, **fields):
    message = {"role": "user", "content": question}
    return {"model": MODEL, "messages": [message], "max_tokens": 16, "seed": 7, "temperature": 0} | fields


def whole(port, request):
    status, said = post(port, "/v1/chat/completions", request)
    assert status == 200, (port, status, said)
    return json.loads(said)["choices"][0]["message"]["content"]


def stream(port, request):
    """The pieces of a streamed answer, as they come."""
    with connected(port) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(request | {"stream": True}), headers(KEY))
        response = connection.getresponse()
        assert response.status == 200, (port, response.status, response.read())
        event = None
        for line in response:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    yield delta["content"]
            event = line.strip() or event
        assert event == b"data: [DONE]", event


def metrics(port):
    """The values of a worker's metrics page that have no labels, by name."""
    lines = [line for line in get(port, "/metrics")[1].splitlines() if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in map(str.split, lines)}


def get(port, path):
    return exchange(port, "GET", path, None, KEY)


def post(port, path, body, key=KEY):
    return exchange(port, "POST", path, json.dumps(body), key)


def exchange(port, method, path, body, key):
    """Status and text; no status where nobody listens."""
    with connected(port) as connection:
        try:
            connection.request(method, path, body, headers(key))
            response = connection.getresponse()
            return response.status, response.read().decode()
        except ConnectionError as error:
            return None, str(error)


def connected(port):
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE))


def headers(key):
    return {"content-type": "application/json", "authorization": f"Bearer {key}"}


def wait(what, ready, process=None):
    end = time.monotonic() + PATIENCE
    while not ready():
        assert process is None or process.poll() is None, f"while waiting until {what}: the process has ended"
        assert time.monotonic() < end, f"waited {PATIENCE} s until {what}"
        time.sleep(0.05)


def end(process):
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listening.getsockname()[1] for listening in sockets]


def done(what):
    print(f"ok: {what}", flush=True)


if __name__ == "__main__":
    main()
