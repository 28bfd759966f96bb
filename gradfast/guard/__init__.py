"""What to do when a step is bad: skip and count, draw the learning rate back, warm up anew, roll back, stop."""

from gradfast.guard.guard import Guard, TrainingStopped
from gradfast.guard.learning_rate import BackOff, Rewarm
from gradfast.guard.loss_watch import LossWatch
from gradfast.guard.snapshots import SnapshotRing

__all__ = ["BackOff", "Guard", "LossWatch", "Rewarm", "SnapshotRing", "TrainingStopped"]
