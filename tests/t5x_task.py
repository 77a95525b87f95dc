"""A user's own task, as MIXTURE_OR_TASK_MODULE names it: byte vocabulary, rows from a function."""

import seqio
import tensorflow as tf

from prompt_tuning.tasks import metrics

# Several batches of training rows, and an epoch ends within one. All targets are equally long, so
# that the mean of some steps' losses is the loss of all their tokens.
ROWS = {"train": 28, "validation": 6}
_VOCABULARY = seqio.ByteVocabulary()


def rows(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    numbers = range(ROWS[split])
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [f"{split} {'row ' * (i % 3)}{7 * i}" for i in numbers],
            "targets": [("nay", "yes")[i % 2] for i in numbers],
        }
    )


seqio.TaskRegistry.add(
    "t5x_yes_no",
    source=seqio.FunctionDataSource(rows, splits=tuple(ROWS), num_input_examples=ROWS),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features={name: seqio.Feature(_VOCABULARY) for name in ("inputs", "targets")},
    metric_fns=[metrics.accuracy],
)
