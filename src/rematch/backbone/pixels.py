"""How many pixels a processor scales pictures to."""

from typing import Any

from rematch.errors import ModelError


def limit_pixels(processor: Any, minimum: int | None, maximum: int | None) -> None:
    """Set the smallest and largest picture, in pixels, that a processor produces.

    The limits are saved with the processor.

    Args:
        processor: Processor of any Hugging Face model; changed in place.
        minimum: Smaller pictures are scaled up to it; ``None`` keeps the current limit.
        maximum: Larger pictures are scaled down to it; ``None`` keeps the current limit.

    Raises:
        ModelError: If the processor scales every picture to a fixed size, or ``minimum`` is larger
            than ``maximum``.
    """
    if minimum is None and maximum is None:
        return
    image_processor = getattr(processor, "image_processor", None)
    size = dict(getattr(image_processor, "size", None) or {})
    size = {name: edge for name, edge in size.items() if edge is not None}
    # processors that merge patches store numbers of pixels under these names, others edge lengths
    in_pixels = size.keys() == {"shortest_edge", "longest_edge"}
    if image_processor is None or not in_pixels or not hasattr(image_processor, "merge_size"):
        raise ModelError(
            f"{type(image_processor).__name__} scales pictures to a fixed size or by their edges "
            f"({size}), so limits in pixels do not apply. Leave out min_pixels and max_pixels."
        )
    smallest, largest = minimum or size["shortest_edge"], maximum or size["longest_edge"]
    if smallest > largest:
        raise ModelError(
            f"min_pixels={smallest} is larger than max_pixels={largest}. Change one of them, or "
            "set both."
        )
    image_processor.size = type(image_processor.size)(shortest_edge=smallest, longest_edge=largest)
