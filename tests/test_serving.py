"""An exported model is served by an existing engine, and says over HTTP what it says here."""

import json
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from helpers import render, script

QUESTION = "What does LoRA train?"


def test_the_readmes_command_serves_what_inference_answers(tmp_path: Path) -> None:
    folder = render(tmp_path / "project")
    quick = ("training.epochs=15", "tracking.enabled=false", "device=cpu")
    script(folder, "train", "configs/smoke.yaml", *quick)
    script(folder, "export", "outputs/smoke", "exported")
    here = script(folder, "inference", "exported", QUESTION, "--max-length", "24").strip()
    readme = (folder / "README.md").read_text()
    (served,) = re.findall(r"`(uv run --with [^`]* transformers serve) exported/my-model`", readme)
    command = [*shlex.split(served), "exported"]
    extra = [*command[: command.index("transformers")], "python", "-c", "import fastapi"]
    if (tried := subprocess.run(extra, cwd=folder, capture_output=True, text=True)).returncode:
        pytest.skip(f"the extra cannot be installed here: {tried.stderr.strip().splitlines()[-1]}")
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    name = command[-1]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        question = {"role": "user", "content": QUESTION}
        request = {"model": name, "messages": [question], "max_tokens": 24}
        found = json.loads(ask(server, port, {**request, "temperature": 0}))
    finally:
        server.terminate()  # uv passes it on
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
