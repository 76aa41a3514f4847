"""All single ops that are measured, by name."""

from __future__ import annotations

from collections.abc import Callable

from adam_work import ADAM_CASES
from cases import OpShape, Work
from codec_work import CODEC_CASES
from expert_work import EXPERT_CASES

OP_CASES: dict[str, Callable[[OpShape], Work]] = {**CODEC_CASES, **EXPERT_CASES, **ADAM_CASES}
