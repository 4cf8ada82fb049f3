"""Calibration: what data tell of the inputs of weights, block by block."""

from resu_compile.calibration.data import Calibration
from resu_compile.calibration.engine import calibrated_masks, input_norms

__all__ = ["Calibration", "calibrated_masks", "input_norms"]
