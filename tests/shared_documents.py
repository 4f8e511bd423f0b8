"""PDF files and videos for tests, written from scratch."""

from pathlib import Path


def save_pdf(path: Path, pages: list[str], title: str = "") -> Path:
    """Write a PDF file with a line of text on each page; an empty text makes an empty page."""
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        font,
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 24 Tf 60 700 Td ({text}) Tj ET" if text else ""
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R"
            f" >> >> /Contents {5 + 2 * i} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    body, offsets = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    body += f"xref\n0 {size}\n0000000000 65535 f \n{table}"
    body += f"trailer\n<< /Size {size} /Root 1 0 R /Info {size - 1} 0 R >>\n"
    body += f"startxref\n{body.index('xref')}\n%%EOF\n"
    path.write_text(body)
    return path


def encrypt(source: Path, target: Path) -> Path:
    """Write a copy of a PDF file that needs a password."""
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(source))
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(target)
    return target


def save_video(path: Path, colours: list[str], seconds: float = 1, rate: int = 5) -> Path:
    """Write a video that shows each colour for this long."""
    import av
    from PIL import Image

    codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for colour in colours:
            for _ in range(round(seconds * rate)):
                frame = av.VideoFrame.from_image(Image.new("RGB", (96, 64), colour))
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
