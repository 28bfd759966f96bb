"""The doctor: explains why a model's gradients explode or vanish before a day is spent on training it."""

from gradfast.monitor.doctor.diagnosis import Diagnosis, diagnose
from gradfast.monitor.doctor.finding import Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
