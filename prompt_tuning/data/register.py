"""Registers the project's tasks when imported.

For upstream T5X, which can only import a module by name: set MIXTURE_OR_TASK_MODULE to
"prompt_tuning.data.register". Everything else calls `tasks.register`.
"""

from prompt_tuning.data import tasks

tasks.ensure_registered()
