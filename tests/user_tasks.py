"""A user's own seqio tasks, as MIXTURE_OR_TASK_MODULE names them: does a word have two a's?

In "short_and_long_as" every third word has a long tail, so that a batch is cut into length groups.
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

VOCABULARY = seqio.ByteVocabulary()


def rows(split, shuffle_files=False, seed=None, tail=0):
    rng = np.random.default_rng(0 if split == "train" else 1)
    words = ["".join(rng.choice(list("abcd"), 6)) for _ in range(48 if split == "train" else 20)]
    answers = ["yes" if word.count("a") > 1 else "no" for word in words]
    inputs = [word + tail * "." if i % 3 == 0 else word for i, word in enumerate(words)]
    return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": answers})


def accuracy(targets, predictions):
    return {"accuracy": 100.0 * float(np.mean(np.asarray(targets) == np.asarray(predictions)))}


for name, tail in (("two_as", 0), ("two_as_again", 0), ("short_and_long_as", 60)):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(rows, tail=tail), splits=["train", "validation"]
        ),
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
seqio.MixtureRegistry.add("all_as", [("two_as", 1.0), ("short_and_long_as", 3.0)])
