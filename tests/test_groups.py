"""Length groups: every row in one of them, few shapes, and how little of them is padding."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIG, cutting_of

from prompt_tuning.batches.groups import (
    Cutting,
    cut_batch,
    fill_up,
    input_widths,
    record_cutting,
    target_widths,
)
from prompt_tuning.config import ConfigError, DataConfig, Experiment, TrainConfig

CUTTING = Cutting(inputs=512, targets=62, fewest=1, most=8)


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.tuples(st.integers(1, 512), st.integers(1, 62)), min_size=8 * n, max_size=8 * n
        )
    )
)
def test_every_row_is_in_one_group_that_holds_it(rows):
    inputs, targets = zip(*rows, strict=True)
    groups = cut_batch(inputs, targets, CUTTING)
    assert sorted(i for g in groups for i in g.rows) == list(range(len(rows)))
    assert {len(g.rows) for g in groups} in ({len(rows)}, {len(rows) // 8})
    longest = 0
    for g in groups:
        assert longest <= min(inputs[i] for i in g.rows)
        longest = max(inputs[i] for i in g.rows)
        assert longest <= g.inputs
        assert g.inputs in input_widths(512)
        assert max(targets[i] for i in g.rows) <= g.targets
        assert g.targets in target_widths(62)
    # A pure function of the lengths: what one host does, all do.
    assert groups == cut_batch(list(inputs), list(targets), CUTTING)


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_widths_are_few_and_end_with_the_length(length):
    for widths, most in ((input_widths(length), 15), (target_widths(length), 10)):
        assert len(widths) <= most
        assert list(widths) == sorted(set(widths))
        assert widths[-1] == length
    assert all(width % 8 == 0 for width in input_widths(length)[:-1])


def test_a_batch_is_cut_only_where_that_saves_more_than_it_costs():
    alike = cut_batch([500] * 32, [2] * 32, CUTTING)
    assert [len(g.rows) for g in alike] == [32]
    assert len(cut_batch([60] * 24 + [500] * 8, [2] * 32, CUTTING)) == 8
    # Half of the rows at width 48 instead of 64 saves 16 tokens each, of GROUP_COST's 64.
    two = Cutting(inputs=512, targets=8, most=2)
    counts = [len(cut_batch([40] * n + [60] * n, [2] * 2 * n, two)) for n in (3, 4, 5)]
    assert counts == [1, 1, 2]
    always = Cutting(inputs=512, targets=8, fewest=2, most=4)
    assert len(cut_batch([500] * 32, [2] * 32, always)) == 2


def test_the_cutting_follows_settings_and_mesh():
    def cutting(parts, **settings):
        experiment = Experiment(
            model_dir="",
            initial_checkpoint_path="",
            model=CONFIG,
            data=DataConfig(
                mixture_or_task_name="any",
                task_feature_lengths={"inputs": 512, "targets": 8},
                batch_size=32,
            ),
            train=TrainConfig(**settings),
        )
        return cutting_of(experiment, parts)

    assert (cutting(1).fewest, cutting(1).most) == (1, 8)
    assert cutting(8).most == 4
    assert cutting(16).most == 2  # groups of 8 rows would not divide by 16
    assert cutting(32).most == 1
    assert cutting(1, length_groups=1).most == 1
    assert cutting(1, length_groups=3).most == 2
    assert (cutting(1, microbatches=8).fewest, cutting(1, microbatches=8).most) == (8, 8)
    assert cutting(1).max_shapes == 2 * 15 * 3
    with pytest.raises(ConfigError, match=r"MICROBATCHES = 3 .*BATCH_SIZE = 32"):
        cutting(1, microbatches=3)
    with pytest.raises(ConfigError, match="8 data-parallel devices"):
        cutting(8, microbatches=8)


def test_a_run_that_goes_on_is_cut_as_it_was_wherever_it_is():
    """Eight groups of four rows, begun on one device, are filled up on eight."""
    data = DataConfig(
        mixture_or_task_name="any",
        task_feature_lengths={"inputs": 512, "targets": 8},
        batch_size=32,
    )
    experiment = Experiment(
        model_dir="",
        initial_checkpoint_path="",
        model=CONFIG,
        data=data,
        train=TrainConfig(microbatches=8),
    )
    begun = cutting_of(experiment, 1)
    wider = cutting_of(experiment, 8, record_cutting(begun))
    assert wider == dataclasses.replace(begun, data_parts=8)
    assert fill_up(wider, 4) == 4


@pytest.mark.parametrize(
    ("folder", "file", "keys"),
    [
        ("BoolQ", "val", ("passage", "question")),
        ("RTE", "train", ("hypothesis", "premise")),
        ("CB", "train", ("hypothesis", "premise")),
    ],
)
def test_real_rows_need_little_more_than_half_of_full_padding(shared_dir, folder, file, keys):
    """Batches of 32 real rows with T5's vocabulary, beside padding to 512; the prompt counted."""
    import sentencepiece

    data = shared_dir / "data"
    vocabulary = sentencepiece.SentencePieceProcessor(
        model_file=str(data / "t5_vocab" / "sentencepiece.model")
    )
    lines = (data / "superglue" / folder / f"{file}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [" ".join([folder.lower(), *(f"{k}: {row[k]}" for k in keys)]) for row in rows]
    lengths = np.minimum([len(ids) + 1 for ids in vocabulary.encode(texts)], 512)
    cutting = Cutting(inputs=512, targets=8, most=8)
    order = np.random.default_rng(0).permutation(len(lengths))
    shapes, padded, real, count = set(), 0, 0, 0
    for start in range(0, len(order) - 31, 32):
        batch = lengths[order[start : start + 32]]
        for g in cut_batch(batch.tolist(), [2] * 32, cutting):
            shapes.add((len(g.rows), g.inputs, g.targets))
            padded += len(g.rows) * g.inputs
        real, count = real + int(batch.sum()), count + 32
    share, with_prompt = padded / (512 * count), (padded + 100 * count) / (612 * count)
    print(f"{folder}: {share:.3f} of padding to 512 ({with_prompt:.3f} with the prompt), ")
    print(f"{1 - real / padded:.0%} of it padding, {len(shapes)} shapes")
    assert share <= 0.38
    assert with_prompt <= 0.48
    assert real / padded >= 0.80
    assert len(shapes) <= 13 <= cutting.max_shapes
