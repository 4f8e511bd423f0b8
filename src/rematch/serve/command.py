"""``rematch serve``."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from rematch.errors import RematchError

try:
    import uvicorn

    from rematch.serve.app import create_app
except ImportError as error:
    raise RematchError(
        f"rematch serve needs {error.name}: pip install 'rematch-mm[serve]'."
    ) from error
from rematch.console import say
from rematch.serve.engine import Engine
from rematch.serve.limits import Limits

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """The command's options; see ``rematch serve --help``."""

    target: str
    port: int = 8000
    host: str = "127.0.0.1"
    model: str | None = None
    api_keys: Path | None = None
    image_hosts: str = ""
    batch_tokens: int = 4096
    waiting: int = 512
    timeout: float = 60.0
    batching: bool = True


def run_server(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C; what was taken by then is finished.

    Raises:
        RematchError: If there is nothing to serve, the key file is empty or missing, or the port
            is taken.
    """
    keys = _keys(options.api_keys)
    listening = _listen(options.host, options.port)
    engine = Engine(options.target, options.model)
    hosts = tuple(host.strip().lower() for host in options.image_hosts.split(",") if host.strip())
    if options.host not in _LOOPBACK and not keys:
        say(
            f"{options.host} can be reached by others, and no API key is asked for. See "
            "--api-keys."
        )
    app = create_app(
        engine,
        Limits(hosts=hosts),
        keys,
        budget=options.batch_tokens,
        most_waiting=options.waiting,
        timeout=options.timeout,
        together=options.batching,
    )
    page = (
        "the search page is at /"
        if engine.index is not None
        else "there is no search page without an index"
    )
    port = listening.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"Serving {options.target} on http://{host}:{port}; {page}. Ctrl-C ends it.", flush=True)  # noqa: T201
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=int(options.timeout) + 1,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(
        family, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # named, or asyncio leaves Nagle on
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise RematchError(
            f"{host}:{port}: cannot be listened on ({error.strerror}). Is something there? Choose "
            "another --port."
        ) from None
    return listening


def _keys(path: Path | None) -> list[str]:
    keys = [
        key.strip() for key in os.environ.get("REMATCH_API_KEYS", "").split(",") if key.strip()
    ]
    if path is None:
        return keys
    try:
        read = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise RematchError(f"--api-keys {path}: cannot be read ({error.strerror}).") from None
    if not read:
        raise RematchError(f"--api-keys {path}: holds no key. Write one a line.")
    return keys + read
