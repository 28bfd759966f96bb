"""See what gradients do: per-layer norms, events, plots, and the doctor."""

from gradfast.monitor.doctor import Diagnosis, Finding, diagnose
from gradfast.monitor.events import Event
from gradfast.monitor.monitor import Monitor
from gradfast.monitor.sinks import CSV, JSONL, Sink, TensorBoard, WandB

__all__ = ["CSV", "JSONL", "Diagnosis", "Event", "Finding", "Monitor", "Sink", "TensorBoard", "WandB", "diagnose"]
