"""What methods must know about one language model: measured by `vtc calibrate`, or published."""

from vtc.calibration.activations import Activations, sink_threshold
from vtc.calibration.data import FILE, Calibration, calibration_of
from vtc.calibration.measure import calibrate

__all__ = [
    "FILE",
    "Activations",
    "Calibration",
    "calibrate",
    "calibration_of",
    "sink_threshold",
]
