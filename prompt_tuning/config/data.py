"""The settings of the data: rows of tasks, the user's own files, a corpus."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, Literal

from prompt_tuning.config.setting import check, setting, settings

OFFICIAL_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
LabelWords = tuple[str, ...] | Mapping[str | int | bool, str]
Truncate = Literal["end", "longest_field"]
Objective = Literal["task", "span_corruption", "prefix_lm"]


@settings
class FileTask:
    """A task of your own files: tasks/custom.gin, docs/your_own_data.md.

    `label_words` maps the values of the target field to the words that the model answers with, or
    lists the words in the order of integer labels; empty, the target field is the answer itself.
    """

    name: str = setting(
        "TASK_NAME", "what it is called; empty: as MIXTURE_OR_TASK_NAME", default=""
    )
    train_file: str = setting("TRAIN_FILE", ".csv, .tsv, .jsonl or .json", default="")
    eval_file: str = setting("EVAL_FILE", "empty: EVAL_SHARE of the training file", default="")
    # The same rows every time, and no text on both sides.
    eval_share: float = setting(
        "EVAL_SHARE",
        "held out for evaluation, if there is no EVAL_FILE",
        default=0.1,
        above=0,
        below=1,
    )
    input_template: str = setting(
        "INPUT_TEMPLATE",
        "{column} stands for the row's value there, {{ and }} for a brace",
        default="{text}",
    )
    target_field: str = setting("TARGET_FIELD", "the column of the answers", default="label")
    label_words: LabelWords = setting(
        "LABEL_WORDS",
        "{'label': 'word', ...}, or the words in the order of integer labels; empty: free text",
        default=(),
    )
    delimiter: str = setting(
        "DELIMITER", "between the columns; empty: a tab in .tsv files, else a comma", default=""
    )
    quote_char: str | None = setting(
        "QUOTE_CHAR",
        "around fields; empty: quotes are characters like any other; None: '\"' where it joins no "
        "rows",
        default=None,
    )

    def __post_init__(self) -> None:
        check(bool(self.target_field), "TARGET_FIELD is empty: name the column of the answers.")
        marks = {"DELIMITER": self.delimiter, "QUOTE_CHAR": self.quote_char or ""}
        for macro, mark in marks.items():
            check(
                len(mark) <= 1 and mark not in ("\n", "\r"),
                f"{macro} must be one character or '', found {mark!r}.",
            )
        if not self.label_words:  # {} is the same setting, in a stored run too
            object.__setattr__(self, "label_words", ())
        if isinstance(self.label_words, Mapping):
            # As text, so that they can be stored as JSON: `1` and `'1'` are one label.
            words = {
                label_key(value): unicodedata.normalize("NFC", word)
                for value, word in self.label_words.items()
            }
            check(
                len(words) == len(self.label_words),
                f"LABEL_WORDS names a label twice: {dict(self.label_words)}.",
            )
            object.__setattr__(self, "label_words", words)
        else:
            words = tuple(unicodedata.normalize("NFC", word) for word in self.label_words)
            object.__setattr__(self, "label_words", words)
        words = self.words
        check(
            len(words) != 1 and all(words),
            f"LABEL_WORDS must name at least two words, none of them empty, found {words}.",
        )
        check(
            isinstance(self.label_words, Mapping) or len(words) == len(self.label_words),
            f"LABEL_WORDS names a word twice: {self.label_words}.",
        )

    @property
    def given(self) -> bool:
        """Whether there is such a task at all."""
        return bool(self.train_file or self.eval_file)

    @property
    def words(self) -> tuple[str, ...]:
        """The words the model answers with, in the order of the classes, each once."""
        words = self.label_words
        return tuple(dict.fromkeys(words.values() if isinstance(words, Mapping) else words))


def label_key(value: Any) -> str:
    """A label as text, however it is written: JSON's true and 1.0 are CSV's `true` and `1`.

    An accented letter is one character, also if it was written as a letter and an accent.

    >>> label_key(True), label_key(1.0), label_key(2), label_key(" good ")
    ('true', '1', '2', 'good')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return unicodedata.normalize("NFC", str(value).strip())


@settings
class DataConfig:
    """The data: which rows, and how they become numbers; a file of superglue/ sets the task."""

    # Evaluation takes several tasks or mixtures; training one.
    mixture_or_task_name: str | tuple[str, ...] = setting(
        "MIXTURE_OR_TASK_NAME", "a seqio task or mixture, e.g. 'super_glue_boolq_v102'"
    )
    mixture_or_task_module: str | None = setting(
        "MIXTURE_OR_TASK_MODULE",
        "a Python module that registers your own seqio tasks",
        default=None,
    )
    task_feature_lengths: Mapping[str, int] = setting(
        "TASK_FEATURE_LENGTHS", "longest rows, in tokens, e.g. {'inputs': 512, 'targets': 8}"
    )
    truncate: Truncate = setting(
        "TRUNCATE",
        "what a longer input loses: its 'end', as T5's, or the end of its 'longest_field'",
        default="end",
    )
    vocabulary: str = setting("VOCABULARY", "or 'bytes', 'tiny'", default=OFFICIAL_VOCABULARY)
    batch_size: int = setting("BATCH_SIZE", "rows a step", default=32, at_least=1)
    tfds_data_dir: str | None = setting(
        "TFDS_DATA_DIR", "where TFDS keeps its data; None: its own default", default=None
    )
    sentinel_targets: bool = setting(
        "SENTINEL_TARGETS",
        "targets begin with <extra_id_0>: for a T5 without LM adaptation (paper 3.3)",
        default=False,
    )
    train_split: str = setting("TRAIN_SPLIT", "split to train on", default="train")
    eval_split: str = setting("EVAL_SPLIT", "split to score", default="validation")
    files: FileTask = FileTask()  # a task of the user's own files, if there is one

    def __post_init__(self) -> None:
        check(
            not self.files.given or bool(self.files.name) or len(self.names) <= 1,
            f"MIXTURE_OR_TASK_NAME names {self.names}: say in TASK_NAME which of them is the task "
            "of TRAIN_FILE and EVAL_FILE.",
        )
        lengths = self.task_feature_lengths
        possible = set(lengths) in ({"inputs", "targets"}, {"inputs"})  # targets: see Experiment
        check(
            possible and all(n >= 1 for n in lengths.values()),
            "TASK_FEATURE_LENGTHS must be {'inputs': T, 'targets': L} with T, L >= 1, found "
            f"{dict(lengths)}.",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every task or mixture asked for."""
        name = self.mixture_or_task_name
        return (name,) if isinstance(name, str) else name

    @property
    def file_task_name(self) -> str:
        """The name of the task of the user's own files; "" if there is none."""
        if not self.files.given:
            return ""
        return self.files.name or next(iter(self.names), "custom")


@settings
class CorpusConfig:
    """Pre-training: what a run reads, and what it hides of it.

    The files runs/pretrain.gin and runs/lm_adapt.gin set these.
    """

    objective: Objective = setting(
        "OBJECTIVE",
        "'span_corruption' or 'prefix_lm' on a corpus; 'task': the rows of a task",
        default="task",
    )
    files: str | tuple[str, ...] = setting(
        "TEXT_FILES",
        "the corpus: text files or JSON lines, or patterns of them (.gz as well)",
        default=(),
    )
    eval_files: str | tuple[str, ...] = setting(
        "EVAL_TEXT_FILES",
        "held-out text; empty: every hundredth document of TEXT_FILES",
        default=(),
    )
    tfds: str = setting(
        "TFDS_CORPUS",
        "instead of files: a TFDS data set ('c4/en:3.1.0') with TRAIN_SPLIT and EVAL_SPLIT",
        default="",
    )
    field: str = setting(
        "TEXT_FIELD", "the field of JSON lines and of TFDS rows that has the text", default="text"
    )
    documents: Literal["paragraph", "line", "file"] = setting(
        "DOCUMENTS",
        "what a document of a text file is: 'paragraph', 'line' or 'file'",
        default="paragraph",
    )
    noise_density: float = setting(
        "NOISE_DENSITY",
        "span corruption: the share of the tokens that is hidden",
        default=0.15,
        above=0,
        below=1,
    )
    mean_noise_span_length: float = setting(
        "MEAN_NOISE_SPAN_LENGTH",
        "span corruption: tokens of a hidden span, on average",
        default=3.0,
        at_least=1,
    )
    merge_documents: bool = setting(
        "MERGE_DOCUMENTS",
        "cut one text of all documents, so that nothing is padded; or each by itself",
        default=True,
    )
    pack: bool = setting(
        "PACK", "several short examples in a row, which do not see each other", default=False
    )

    def __post_init__(self) -> None:
        check(
            not (self.files and self.tfds),
            f"TEXT_FILES ({self.files!r}) and TFDS_CORPUS ({self.tfds!r}) are both set: a run reads"
            " one corpus. Empty the other.",
        )
