"""Which original checkpoint a store was made of, and whether it is still there."""

from __future__ import annotations

import logging
from pathlib import Path

from .checkpoint_source import ModelSource
from .errors import StoreError
from .store import ExpertStore

logger = logging.getLogger(__name__)


def open_originals(store: ExpertStore, override: str | Path | None = None) -> ModelSource | None:
    """The checkpoint that `store` was quantised from: at `override`, or where the store remembers it.

    None, with a warning, when the store remembers no place or nothing is there any more.

    Raises StoreError when there is nothing at `override`, or when what was found is another checkpoint.
    """
    if override is not None:
        source = ModelSource.open(override)
    else:
        remembered = store.source_path
        if remembered is None or not Path(remembered).is_dir():
            logger.warning("the original weights are not at %s: decoded codes will stand in for them", remembered)
            return None
        source = ModelSource.open(remembered)
    if source.fingerprint != store.fingerprint:
        raise StoreError(
            f"{source.path} is not the checkpoint that the store was made of "
            f"(fingerprint {source.fingerprint[:12]}..., the store's is {str(store.fingerprint)[:12]}...)"
        )
    return source
