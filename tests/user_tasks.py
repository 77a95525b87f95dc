"""A user's own seqio tasks, as MIXTURE_OR_TASK_MODULE names them: does a word have two a's?"""

import numpy as np
import seqio
import tensorflow as tf

VOCABULARY = seqio.ByteVocabulary()


def rows(split, shuffle_files=False, seed=None):
    rng = np.random.default_rng(0 if split == "train" else 1)
    words = ["".join(rng.choice(list("abcd"), 6)) for _ in range(48 if split == "train" else 20)]
    answers = ["yes" if word.count("a") > 1 else "no" for word in words]
    return tf.data.Dataset.from_tensor_slices({"inputs": words, "targets": answers})


def accuracy(targets, predictions):
    return {"accuracy": 100.0 * float(np.mean(np.asarray(targets) == np.asarray(predictions)))}


for name in ("two_as", "two_as_again"):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(rows, splits=["train", "validation"]),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": seqio.Feature(VOCABULARY),
            "targets": seqio.Feature(VOCABULARY),
        },
        metric_fns=[accuracy],
    )
seqio.MixtureRegistry.add("both_as", [("two_as", 1.0), ("two_as_again", 3.0)])
