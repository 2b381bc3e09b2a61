"""What the page of the study shows of one prompt and of the model's attention."""

from typing import Any

from experiments.kv.study import StudyConfig
from jaxfw.generate import LM


def sections(lm: LM, c: StudyConfig) -> list[Any]:
    """Sections of the page."""
    return []
