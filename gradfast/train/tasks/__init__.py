"""What a run learns: classification of whole images, or detection of objects in them.

A task supplies data, model, loss and measure; `gradfast.train` does everything else and knows no task by name.
"""

from __future__ import annotations

from gradfast.train.tasks.task import Task


def find_task(name: str) -> Task:
    """The task of ``--task``; the packages that it needs are imported only now."""
    if name == "detect":
        from gradfast.train.tasks.detect import Detect

        return Detect()
    from gradfast.train.tasks.classify import Classify

    return Classify()
