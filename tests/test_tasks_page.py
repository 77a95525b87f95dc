"""docs/tasks.md is what is registered.

After a deliberate change of the tables `python tests/test_tasks_page.py` writes it anew.
"""

import re
from pathlib import Path

from prompt_tuning.tasks import glue, qa, registry, superglue
from prompt_tuning.tasks.spec import TaskSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"
TEXTS = {
    superglue.record: "query: entities: passage:",
    superglue.wsc: "the text with the pronoun in asterisks",
    superglue.wsc_right: "the text with the pronoun in asterisks",
    superglue.dpr: "the sentence with the pronoun in asterisks",
    qa.question: "question: context:",
}
ANSWERS = {
    superglue.record: "an entity of the row",
    superglue.wsc: "the noun that is offered",
    superglue.wsc_right: "the right noun",
    superglue.dpr: "a candidate of the row",
    glue.similarity: "0.0, 0.2, ... 5.0",
    qa.question: "any text",
}
METRICS = {
    "multirc_exact_match": "exact_match",
    "f1_with_invalid": "f1",
    "mean_f1": "mean_3class_f1",
    "squad": "em, f1",
    "record_squad": "em, f1",
}


def line(spec: TaskSpec) -> str:
    """The task's line of the page."""
    text = TEXTS.get(spec.convert) or " ".join(f"{feature}:" for feature in spec.features)
    words = ", ".join(spec.words or spec.labels) or ANSWERS[spec.convert]
    names = [METRICS.get(metric.__name__, metric.__name__) for metric in spec.metrics]
    splits = spec.splits or ()
    source = f"`{spec.source}`" + (f" ({', '.join(splits)})" if splits else "")
    text = f"`{spec.word} {text}`" if spec.word else f"`{text}`"
    return f"| `{spec.name}` | {source} | {text} | {words} | {', '.join(names) or 'none'} |"


def tables() -> str:
    """The generated part of the page."""
    found = []
    for title, specs, mixtures in (
        ("SuperGLUE", superglue.TASKS, superglue.MIXTURES),
        ("GLUE", glue.TASKS, glue.MIXTURES),
        ("Questions", qa.TASKS, qa.MIXTURES),
    ):
        found += [f"## {title}", "", "| name | TFDS | text | answers | metrics |", "|---" * 5 + "|"]
        found += [line(spec) for name, spec in specs.items() if not name.endswith("_v200")]
        found += ["", "| mixture | tasks and their rates |", "|---|---|"]
        for name, rates in mixtures.items():
            parts = ", ".join(f"`{task}` {rate:,.0f}" for task, rate in rates)
            found.append(f"| `{name}` | {parts} |")
        found.append("")
    return "\n".join(found)


def test_the_page_is_that_of_the_tables():
    assert PAGE.read_text().split("<!-- generated -->\n\n")[1] == tables()


def test_every_name_of_the_page_is_registered():
    registry.register("bytes")
    names = re.findall(r"^\| `([\w.]+)`", PAGE.read_text(), flags=re.MULTILINE)
    assert len(names) > 50
    assert set(names) <= set(registry.task_names())


if __name__ == "__main__":
    written = PAGE.read_text().split("<!-- generated -->\n\n")[0]
    PAGE.write_text(written + "<!-- generated -->\n\n" + tables())
