"""What can be learnt, by name: `--task NAME`. A task's module is imported when it is asked for."""

from importlib import import_module

from runtime.errors import UsageError, did_you_mean

from .base import Batch, Evaluator, Prediction, Sample, Task

__all__ = ["DEFAULT_TASK", "TASKS", "Batch", "Evaluator", "Prediction", "Sample", "Task", "find_task"]

TASKS = {
    "classification": "tasks.classification.task:Classification",
    "token_labeling": "tasks.token_labeling.task:TokenLabeling",
    "segmentation": "tasks.segmentation.task:Segmentation",
    "detection": "tasks.detection.task:Detection",
}
DEFAULT_TASK = "classification"


def find_task(name: str) -> type[Task]:
    """Return the class of a task. Raises UsageError, naming the closest one, if there is none of this name."""
    if name not in TASKS:
        raise UsageError(f"unknown --task {name!r}; {did_you_mean(name, TASKS, 'known: ' + ', '.join(TASKS))}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)
