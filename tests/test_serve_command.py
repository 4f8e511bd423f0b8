"""``rematch serve``: stopped and started again, and its errors."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error

import pytest
from shared_server import card_engine, post

from rematch import cli


def test_killed_and_started_again(saved_model, tmp_path):
    engine = card_engine(saved_model, tmp_path)
    command = [sys.executable, "-m", "rematch.cli", "serve", engine.index.uri, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    answers = []
    for stop in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            address = process.stdout.readline().split(" on ")[1].split(";")[0]
            for _ in range(100):
                try:
                    body = {"text": "a red card", "rerank": "feat:3"}
                    _, _, content = post(f"{address}/v1/search", body, seconds=30)
                    answers.append([hit["id"] for hit in content["hits"]])
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            process.send_signal(stop)
            process.wait(30)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6


def test_errors_of_the_command(monkeypatch, capfd, tmp_path, saved_model):
    def serve(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rematch", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        output = capfd.readouterr().err
        assert "Traceback" not in output
        return output

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in serve(saved_model, "--port", port)
    (tmp_path / "keys").write_text("\n")
    assert "cannot be read" in serve(saved_model, "--api-keys", tmp_path / "none")
    assert "has no key" in serve(saved_model, "--api-keys", tmp_path / "keys")
    assert "not a ReMatch checkpoint" in serve(tmp_path, "--port", 0)
