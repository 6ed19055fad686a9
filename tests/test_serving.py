"""An exported model is served by an existing engine, and says over HTTP what it says here."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from helpers import render, run

QUESTION = "What does LoRA train?"
# In one process, which imports torch once.
EXPORTED = """
import sys
import scripts.train, scripts.export, scripts.inference
quick = ["training.epochs=8", "tracking.enabled=false", "device=cpu"]
scripts.train.main(["configs/smoke.yaml", *quick])
scripts.export.main(["outputs/smoke", "exported"])
print("says")
scripts.inference.main(["exported", sys.argv[1], "--max-length", "24"])
"""


def test_the_readmes_command_serves_what_inference_answers(tmp_path: Path) -> None:
    folder = render(tmp_path / "project")
    command = (sys.executable, "-c", EXPORTED, QUESTION)
    here = run(*command, cwd=folder, PYTHONPATH=str(folder)).stdout.rpartition("says\n")[2].strip()
    readme = (folder / "README.md").read_text()
    (served,) = re.findall(r"`(uv run --with [^`]* transformers serve) exported/my-model`", readme)
    command = [*shlex.split(served), "exported"]
    # This environment has the lock's versions. To compile a new one's files takes half a minute.
    env = {**os.environ, "UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1"}
    extra = [*command[: command.index("transformers")], "python", "-c", "import fastapi"]
    tried = subprocess.run(extra, cwd=folder, env=env, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"the extra cannot be installed here: {tried.stderr.strip().splitlines()[-1]}")
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    name = command[-1]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL)
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
