"""An exported model is served by an existing engine, and says over HTTP what it says here."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from helpers import render, script

QUESTION = "What does LoRA train?"


def test_a_served_export_answers_as_it_does_here(tmp_path: Path) -> None:
    folder = render(tmp_path / "project")
    quick = ("training.epochs=15", "tracking.enabled=false", "device=cpu")
    script(folder, "train", "configs/smoke.yaml", *quick)
    script(folder, "export", "outputs/smoke", "exported")
    here = script(folder, "inference", "exported", QUESTION, "--max-length", "24").strip()
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    engine = Path(sys.executable).with_name("transformers")
    command = [engine, "serve", folder / "exported", "--host", "127.0.0.1", "--device", "cpu"]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        question = {"role": "user", "content": QUESTION}
        request = {"model": str(folder / "exported"), "messages": [question], "max_tokens": 24}
        found = json.loads(ask(server, port, {**request, "temperature": 0}))
    finally:
        server.kill()
        server.wait()
    assert found["choices"][0]["message"]["content"].strip() == here
    assert here


def ask(server: subprocess.Popen, port: int, request: dict) -> bytes:
    """Post once the server is there."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(url, json.dumps(request).encode(), headers)
    for _ in range(240):
        assert server.poll() is None
        try:
            return urllib.request.urlopen(post, timeout=60).read()
        except urllib.error.URLError:
            time.sleep(0.5)
    raise AssertionError("the server did not start within two minutes")
