"""The lines that `t5x inspect-prompt` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prompt_tuning.prompts.inspection import Inspected, Inspection, Label, Spread


def describe(found: Inspection) -> str:
    """Everything that was found, for reading; `Inspection.to_json` has the same for programs."""
    lines = [
        f"{found.checkpoint}: {found.embeddings} embeddings, norms {_norms(found.embedding_norms)}"
    ]
    for prompt in found.prompts:
        lines += ["", *_describe_prompt(prompt, found.embedding_norms)]
    if len(found.prompts) > 1:
        lines += ["", *_describe_similarity(found)]
    return "\n".join(lines)


def _norms(spread: Spread) -> str:
    return f"{spread.mean:.2f} (sd {spread.sd:.2f}, {spread.min:.2f} to {spread.max:.2f})"


def _describe_prompt(prompt: Inspected, table: Spread) -> Iterator[str]:
    known = prompt.metadata
    facts = [f"float32{list(prompt.array.shape)}", known.task, f"step {known.step}"]
    if known.score is not None:
        facts.append(f"{known.score_name} {known.score:.1f}")
    yield f"{prompt.name}: {', '.join(fact for fact in facts if fact and fact != 'step 0')}"
    times = prompt.norms.mean / table.mean if table.mean else 0.0
    yield f"norms {_norms(prompt.norms)}: {times:.2f} times the embeddings'"
    if prompt.distance:
        of = f"{prompt.distance.rows} of {len(prompt.rows)} rows"
        yield (
            f"from its beginning ({of}): moved {prompt.distance.relative:.2f} of its length, "
            f"cosine {prompt.distance.cosine:.2f}"
        )
    yield f"{'row':>4} {'norm':>9}  nearest pieces by cosine"
    for number, row in enumerate(prompt.rows):
        near = "  ".join(f"{n.piece} {n.cosine:.2f}" for n in row.neighbours)
        yield f"{number:>4} {row.norm:>9.2f}  {near}"
    shared = Counter(row.neighbours[0].piece for row in prompt.rows if row.neighbours)
    often = [f"{piece} ({count})" for piece, count in shared.most_common(5) if count > 1]
    if often:
        yield f"nearest to several rows: {', '.join(often)}"
    yield from map(_describe_label, prompt.labels)


def _describe_label(label: Label) -> str:
    rows = ", ".join(map(str, label.neighbour_of[:20]))
    more = ", ..." if len(label.neighbour_of) > 20 else ""
    where = f"among the neighbours of rows {rows}{more}" if rows else "no row's neighbour"
    return (
        f"label {label.word!r} ({' '.join(label.pieces)}): {where}; nearest is row "
        f"{label.nearest_row}, cosine {label.cosine:.2f}"
    )


def _describe_similarity(found: Inspection) -> Iterator[str]:
    width = max(len(prompt.name) for prompt in found.prompts)
    for title, matrix in (
        ("similarity of the prompts: cosine of their mean rows", found.pooled),
        ("mean cosine over all pairs of rows", found.pairs),
    ):
        yield title
        for prompt, values in zip(found.prompts, matrix, strict=True):
            yield f"{prompt.name:<{width}} " + " ".join(f"{value:>6.3f}" for value in values)
