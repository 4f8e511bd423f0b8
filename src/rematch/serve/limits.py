"""What a client may send, and the error that tells it what to change."""

from dataclasses import dataclass

from rematch.errors import RematchError


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body: Bytes of the body.
        body_seconds: Seconds until the body has to be complete.
        receiving: Bytes of all large bodies that are being received.
        values: Values in the body: strings, numbers, keys, lists and objects.
        inputs: Number of inputs to embed, or of documents to rerank.
        images: Number of pictures.
        pixels: Pixels of a picture.
        request_pixels: Pixels of all pictures of a request.
        held_pixels: Pixels of the pictures of all requests that are being served.
        scans: Passes over a progressive JPEG, each of which costs as much as a picture.
        text: Characters of a text.
        hosts: Hosts from which pictures may be fetched; none by default. ``.example.org`` stands
            for every host below it.
        remote_bytes: Bytes of a fetched picture.
        remote_seconds: Seconds for fetching all pictures of a request, redirects included.
    """

    body: int = 32 << 20
    body_seconds: float = 30.0
    receiving: int = 256 << 20
    values: int = 20_000
    inputs: int = 256
    images: int = 32
    pixels: int = 25_000_000
    request_pixels: int = 50_000_000
    held_pixels: int = 200_000_000
    scans: int = 100
    text: int = 20_000
    hosts: tuple[str, ...] = ()
    remote_bytes: int = 16 << 20
    remote_seconds: float = 10.0


class ClientError(RematchError):
    """A request that cannot be served as it is; the message tells the client what to change.

    Attributes:
        status: HTTP status of the response.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
