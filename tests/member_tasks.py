"""A mixture of three tasks over the same reviews, as MIXTURE_OR_TASK_MODULE names it.

"tiny_gloom" is "tiny_mood" with its two answers exchanged: no prompt that is the same for both can
answer more than half of the rows.
"""

import seqio
import tensorflow as tf

from prompt_tuning.tasks import answers, metrics
from prompt_tuning.tasks.vocabulary import seqio_vocabulary
from prompt_tuning.world.generator import DEMO_SPLITS, DEMO_TASKS, demo_rows

UP, DOWN = DEMO_TASKS["tiny_mood"].label_words
EXCHANGED = {UP: DOWN, DOWN: UP}


def rows(split, shuffle_files=False, seed=None):
    examples = demo_rows("tiny_mood", split)
    targets = [EXCHANGED[row["targets"]] for row in examples]
    inputs = [row["inputs"] for row in examples]
    return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": targets})


FEATURE = seqio.Feature(seqio_vocabulary("tiny"))
seqio.TaskRegistry.add(
    "tiny_gloom",
    source=seqio.FunctionDataSource(rows, splits=tuple(DEMO_SPLITS)),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features={"inputs": FEATURE, "targets": FEATURE},
    postprocess_fn=answers.to_label(DOWN, UP),
    metric_fns=[metrics.accuracy],
)
seqio.MixtureRegistry.add(
    "tiny_three", [("tiny_topic", 1.0), ("tiny_mood", 1.0), ("tiny_gloom", 1.0)]
)
seqio.MixtureRegistry.add("tiny_two_scored", [("tiny_topic", 1.0), ("tiny_mood", 0.0)])
