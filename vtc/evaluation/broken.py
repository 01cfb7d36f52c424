"""What downsampling breaks: the filter of VTC-Bench (arXiv 2510.07143).

Where a smaller picture answers as well, an accuracy says little about which tokens were chosen. The
filter leaves the questions that the full model answers and the smaller picture of the same budget
does not. They are also the ones that the smaller picture happened to miss: compare methods with
each other on them, `random` included, not with the smaller picture, which has none of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vtc.evaluation.statistics import RIGHT, Floats, Interval, accuracy_interval

# Wilson's interval of fewer answers covers more than half of the scale
LEAST = 10


def broken(full: Floats, downsample: Floats) -> NDArray[np.bool_]:
    """Which questions the full model answers and a smaller picture does not: `bool [questions]`.

    Args:
        full: scores of the full model, `[questions]`.
        downsample: of the smaller picture, averaged over seeds.
    """
    found: NDArray[np.bool_] = (full >= RIGHT) & (downsample < RIGHT)
    return found


def broken_share(full: Floats, downsample: Floats) -> float | None:
    """The share of the full model's right answers that downsampling breaks; None of none."""
    answered = int((full >= RIGHT).sum())
    return int(broken(full, downsample).sum()) / answered if answered else None


def broken_accuracy(own: Floats, full: Floats, downsample: Floats) -> Interval | None:
    """Accuracy on the questions that downsampling breaks; None where they are below `LEAST`.

    Args:
        own: scores of a method at the same keep, averaged over seeds.
        full: of the full model.
        downsample: of the smaller picture.
    """
    which = broken(full, downsample)
    return accuracy_interval(own[which]) if int(which.sum()) >= LEAST else None
