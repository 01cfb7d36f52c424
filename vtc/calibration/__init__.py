"""What methods must know about one language model: measured by `vtc calibrate`, or published."""

from vtc.calibration.data import Calibration, calibration_of

__all__ = ["Calibration", "calibration_of"]
