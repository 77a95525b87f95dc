"""Registers the project's tasks when imported.

For upstream T5X, which can only import a module by name: set MIXTURE_OR_TASK_MODULE to
"prompt_tuning.tasks.register". Everything else calls `registry.register`.
"""

from prompt_tuning.tasks import registry

registry.ensure_registered()
