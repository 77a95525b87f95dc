"""Chunks, rows and batches of a corpus: nothing lost, nothing too long, functions of the step."""

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.config import ConfigError, CorpusConfig
from prompt_tuning.model import loss
from prompt_tuning.pretraining import examples
from tests.test_objectives import restore
from tests.tiny_models import CONFIG, forward, join_documents, random_params

VOCAB = 1000
DOCUMENTS = st.lists(
    st.lists(st.integers(3, 500), min_size=0, max_size=40), min_size=1, max_size=12
)


def make(documents, *, inputs=16, targets=None, seed=0, **settings) -> examples.Examples:
    lengths = {"inputs": inputs} | ({"targets": targets} if targets else {})
    shape = examples.make_shape(CorpusConfig(**settings), lengths, VOCAB)
    return examples.Examples(join_documents("text", documents), shape, seed)


def pairs(found: examples.Examples, epoch: int) -> list:
    return [found.epoch(epoch).pair(i) for i in range(found.num_chunks)]


@settings(deadline=None, max_examples=60)
@given(
    DOCUMENTS, st.booleans(), st.integers(0, 3), st.sampled_from(["span_corruption", "prefix_lm"])
)
def test_an_epoch_has_every_token_once(documents, merge, number, objective):
    """But for a last token by itself, of which nothing could be asked."""
    total = sum(map(len, documents))
    kept = [len(d) for d in documents if len(d) > 1]
    if not (total > 1 if merge else kept):
        with pytest.raises(ConfigError):
            make(documents, objective=objective, merge_documents=merge)
        return
    found = make(documents, objective=objective, merge_documents=merge)
    tokens = Counter()
    for pair in pairs(found, number):
        if objective == "prefix_lm":
            tokens.update([*pair.inputs[:-1].tolist(), *pair.targets[:-1].tolist()])
        else:
            tokens.update(restore(pair.inputs[:-1], pair.targets[:-1], VOCAB - 1))
        assert len(pair.inputs) <= found.shape.inputs
        assert len(pair.targets) <= found.shape.targets
    everything = Counter(t for d in documents for t in d)
    assert not tokens - everything
    lost = (everything - tokens).total()
    assert lost <= (1 if merge else len(documents))


def test_merged_documents_follow_each_other_whole():
    """The chunks of an epoch, put in order, are its documents in some order."""
    documents = [list(range(10 * i, 10 * i + 10)) for i in range(1, 9)]
    found = make(documents, objective="prefix_lm", merge_documents=True, inputs=18)
    for number in (0, 1):
        epoch = found.epoch(number)
        place = {int(chunk): i for i, chunk in enumerate(epoch._order)}
        text = []
        for chunk in range(found.num_chunks):
            pair = epoch.pair(place[chunk])
            text += [*pair.inputs[:-1].tolist(), *pair.targets[:-1].tolist()]
        parts = [text[i : i + 10] for i in range(0, 80, 10)]
        assert sorted(parts) == documents
    assert parts != documents


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_a_batch_is_a_function_of_seed_and_step(objective, pack):
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 500, rng.integers(2, 14)).tolist() for _ in range(30)]
    settings = {"objective": objective, "merge_documents": False, "pack": pack}
    one, other = make(documents, **settings), make(documents, **settings)
    forward = [one.batch(step, 7) for step in range(12)]  # several epochs
    for step in (11, 3, 0):  # as a run that was killed would ask
        for name, array in other.batch(step, 7).items():
            np.testing.assert_array_equal(array, forward[step][name])
    another = make(documents, seed=1, **settings).batch(0, 7)["encoder_input_tokens"]
    assert (another != forward[0]["encoder_input_tokens"]).any()


def test_an_epoch_comes_in_another_order_and_hides_other_tokens():
    documents = [list(range(3 + 60 * i, 63 + 60 * i)) for i in range(15)]
    found = make(documents, objective="span_corruption", merge_documents=False, inputs=64)
    first, second = ([tuple(p.inputs.tolist()) for p in pairs(found, e)] for e in (0, 1))
    assert not set(first) & set(second)
    assert [p[0] for p in first] != [p[0] for p in second]


def test_packed_rows_hold_all_examples_and_fit():
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 500, rng.integers(2, 14)).tolist() for _ in range(40)]
    settings = {"objective": "prefix_lm", "merge_documents": False, "inputs": 24, "targets": 24}
    found = make(documents, pack=True, **settings)
    epoch = found.epoch(0)
    rows = [epoch.places(number) for number in range(epoch.num_rows)]
    assert [place for row in rows for place in row] == list(range(found.num_chunks))
    assert len(rows) < 0.6 * found.num_chunks
    (batch,) = found.batches(0, len(rows))
    names = {"segment_ids", "positions"}
    assert {n for n in batch if n.split("_", 1)[1] in names} == {
        f"{side}_{name}" for side in ("encoder", "decoder") for name in names
    }
    segments, positions = batch["encoder_segment_ids"], batch["encoder_positions"]
    starts = (positions == 0) & (segments > 0)
    assert starts.sum() == found.num_chunks
    assert (batch["decoder_input_tokens"][(batch["decoder_positions"] == 0)] == 0).all()


def test_packed_rows_give_the_logits_of_separate_rows():
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 300, rng.integers(4, 12)).tolist() for _ in range(12)]
    settings = {"objective": "prefix_lm", "merge_documents": False, "inputs": 24, "targets": 24}
    packed, separate = (make(documents, pack=pack, **settings) for pack in (True, False))
    params, nothing = random_params(), jax.numpy.zeros((0, CONFIG.embed_dim))

    def logits(found: examples.Examples) -> dict:
        """Of every example, by its targets."""
        (batch,) = found.batches(0, found.epoch(0).num_rows)
        on_device = {name: jax.numpy.asarray(value) for name, value in batch.items()}
        out = np.asarray(forward(CONFIG, params, nothing, on_device))
        segments = batch.get("decoder_segment_ids", batch["decoder_target_tokens"] > 0)
        return {
            tuple(batch["decoder_target_tokens"][row, here].tolist()): out[row, here]
            for row in range(len(segments))
            for here in (segments[row] == s for s in range(1, segments[row].max() + 1))
        }

    one, other = logits(packed), logits(separate)
    assert packed.epoch(0).num_rows < separate.epoch(0).num_rows
    assert one.keys() == other.keys()
    for targets, values in one.items():
        np.testing.assert_allclose(values, other[targets], atol=1e-5, rtol=1e-5)


def test_packed_and_separate_rows_have_the_same_loss():
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 300, 9).tolist() for _ in range(8)]
    settings = {"objective": "span_corruption", "merge_documents": False, "inputs": 24}
    params, nothing = random_params(), jax.numpy.zeros((0, CONFIG.embed_dim))
    sums = []
    for pack in (True, False):
        found = make(documents, pack=pack, targets=24, **settings)
        (arrays,) = found.batches(0, found.epoch(0).num_rows)
        batch = {name: jax.numpy.asarray(value) for name, value in arrays.items()}
        sums.append(loss.loss_fn(forward(CONFIG, params, nothing, batch), batch)[1])
    for name, value in sums[0].items():
        np.testing.assert_allclose(value, sums[1][name], rtol=1e-5)


def test_held_out_batches_are_filled_up_with_padding():
    found = make([[5, 6, 7, 8]] * 5, objective="prefix_lm", merge_documents=False)
    batches = list(found.batches(0, 4, limit=5))
    assert [int((b["decoder_loss_weights"].sum(axis=1) > 0).sum()) for b in batches] == [4, 1]
    assert {b["encoder_input_tokens"].shape for b in batches} == {(4, 16)}


@pytest.mark.parametrize(
    ("objective", "lengths", "expected"),
    [
        ("span_corruption", {"inputs": 3}, "too short"),
        ("span_corruption", {"inputs": 512, "targets": 100}, "{'inputs': 512, 'targets': 114}"),
        ("prefix_lm", {"inputs": 2, "targets": 9}, "too short"),
        ("prefix_lm", {"inputs": 8, "targets": 1}, "too short"),
    ],
)
def test_lengths_that_cannot_be_are_refused(objective, lengths, expected):
    with pytest.raises(ConfigError, match=expected):
        examples.make_shape(CorpusConfig(objective=objective), lengths, VOCAB)
