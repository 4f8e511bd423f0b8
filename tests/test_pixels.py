"""Limits of the pixels that a processor scales pictures to."""

import pytest

from rematch.errors import ModelError
from rematch.evaluate.command import EvaluateOptions, load_model


def test_a_model_that_scales_pictures_to_one_size_takes_no_pixel_limits(saved_model):
    with pytest.raises(ModelError, match="fixed size"):
        load_model(EvaluateOptions(str(saved_model), max_pixels=10_000))
