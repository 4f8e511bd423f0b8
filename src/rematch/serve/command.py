"""``rematch serve``: load, listen, serve."""

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
        f"rematch serve needs {error.name}. Install it: pip install 'rematch-mm[serve]'."
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
    """Serve until SIGTERM or Ctrl-C, then finish the requests that are queued.

    Raises:
        RematchError: If the target is neither an index nor a model, the key file is missing or
            empty, or the port is in use.
    """
    keys = _load_keys(options.api_keys)
    with _listen(options.host, options.port) as listener:
        engine = Engine(options.target, options.model)
        if options.host not in _LOOPBACK and not keys:
            say(
                f"other machines can reach {options.host}, and no API key is required. Consider "
                "--api-keys."
            )
        hosts = [host.strip().lower() for host in options.image_hosts.split(",")]
        app = create_app(
            engine,
            Limits(hosts=tuple(host for host in hosts if host)),
            keys,
            batch_tokens=options.batch_tokens,
            waiting=options.waiting,
            timeout=options.timeout,
            batching=options.batching,
        )
        print(_banner(options, listener.getsockname()[1], engine), flush=True)  # noqa: T201
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=int(options.timeout) + 1,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _banner(options: ServeOptions, port: int, engine: Engine) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    page = "the search page is at /"
    if engine.index is None:
        page = "there is no search page without an index"
    return f"Serving {options.target} on http://{host}:{port}; {page}. Press Ctrl-C to stop."


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named, asyncio switches Nagle's algorithm off
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise RematchError(
            f"cannot listen on {host}:{port} ({error.strerror}). Stop what uses it, or choose "
            "another --port."
        ) from None
    return listener


def _load_keys(path: Path | None) -> list[str]:
    """API keys from the environment and from a file.

    Raises:
        RematchError: If the file cannot be read or holds no key.
    """
    values = os.environ.get("REMATCH_API_KEYS", "").split(",")
    keys = [value.strip() for value in values if value.strip()]
    if path is None:
        return keys
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise RematchError(
            f"--api-keys {path}: cannot be read ({error.strerror}). Give a file with one key a "
            "line."
        ) from None
    keys_in_file = [line.strip() for line in lines if line.strip()]
    if not keys_in_file:
        raise RematchError(f"--api-keys {path}: has no key. Write one key per line.")
    return keys + keys_in_file
