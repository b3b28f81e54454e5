"""KFAC without the default clip, where the arithmetic of the other parts is the subject."""

from __future__ import annotations

from functools import partial

import kronfac as kf

unclipped = partial(kf.optim.KFAC, kl_clip=None)
