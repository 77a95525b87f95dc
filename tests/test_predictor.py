"""Rows under different prompts in one batch get what they would get alone."""

import functools
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ONE_LAYER as CONFIG
from tiny_models import as_prompt, random_prompt

from prompt_tuning.checkpoints import identity, t5x
from prompt_tuning.config import ConfigError
from prompt_tuning.decoding import decode
from prompt_tuning.model import loss, sharding, t5
from prompt_tuning.model.prompt import Prompt, encode, no_prompt, stack_prompts
from prompt_tuning.prompts import prompt_file
from prompt_tuning.serving import mixed_batch
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.vocabularies.vocabulary import ByteVocabulary

LENGTHS = {"long": 11, "short": 2}
PROMPTS = {
    name: np.asarray(random_prompt(length, CONFIG, seed=seed))
    for seed, (name, length) in enumerate(LENGTHS.items())
}
# With any prompt, the longest row makes a batch of 8 x 48: nothing else is compiled.
TEXTS = ["a first text", "b", "", "the text that is longer than others.", "c d", "e"]
NAMES = ["short", "long", None, None, "long", "short"]
LABELS = ["yes", "no", "never"]
LIMITS = {"max_input_length": 48, "max_target_length": 6, "batch_size": 8}


@pytest.fixture(scope="module")
def backbone():
    params = jax.jit(t5.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    # Wide relative biases: a prompt at the wrong distance from its text must show.
    return {k: v * (4.0 if "rel_embedding" in k else 1.0) for k, v in params.items()}


@pytest.fixture(scope="module")
def predictor(backbone):
    return Predictor(CONFIG, backbone, ByteVocabulary(), PROMPTS, **LIMITS)


def prompt_of(name):
    return jnp.zeros((0, CONFIG.embed_dim)) if name is None else jnp.asarray(PROMPTS[name])


def alone(predictor, text):
    """The row as a batch of its own, padded to the one width that is compiled here."""
    (row,), _ = predictor.tokenize([text])
    return jnp.asarray([row + [0] * (48 - len(row))], jnp.int32)


# The reference: a batch of one row with one prompt.
encode_alone = jax.jit(encode, static_argnums=0)
MODEL = t5.T5(CONFIG)
generate_alone = jax.jit(
    decode.generate, static_argnums=0, static_argnames=("length", "num_decodes")
)


@functools.partial(jax.jit, static_argnums=0)
def score_alone(model, backbone, prompt, tokens, labels):
    encoded = encode(model, backbone, prompt, tokens)
    return loss.label_log_likelihoods(model, backbone, prompt, encoded, labels)


encode_mixed = jax.jit(mixed_batch.encode_mixed, static_argnums=0)


# The encoder

PROMPT_LENGTHS = (3, 1, 9, 0, 4)


@pytest.fixture(scope="module")
def some_prompts():
    return [
        Prompt(random_prompt(length, CONFIG, seed=n)) for n, length in enumerate(PROMPT_LENGTHS)
    ]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(3, 383), min_size=1, max_size=12),
            st.integers(0, len(PROMPT_LENGTHS)),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_every_row_is_encoded_as_if_it_were_alone(backbone, some_prompts, rows):
    prompts = [*some_prompts, no_prompt(CONFIG)]
    members = stack_prompts(prompts)
    tokens, which = zip(*rows, strict=True)
    lengths = [len(prompt.rows) for prompt in prompts]
    batches = mixed_batch.mixed_batches(tokens, which, lengths, batch_size=4, multiple=4)
    seen = []
    for places, batch in batches:
        encoded, valid = encode_mixed(MODEL, backbone, members, batch)
        for place, own, counts in zip(places, *map(np.asarray, (encoded, valid)), strict=False):
            row = jnp.asarray([tokens[place] + [0] * (12 - len(tokens[place]))], jnp.int32)
            expected, _ = encode_alone(MODEL, backbone, prompts[which[place]], row)
            length = lengths[which[place]] + len(tokens[place])
            np.testing.assert_array_equal(counts, np.arange(len(counts)) < length)
            np.testing.assert_allclose(own[:length], np.asarray(expected)[0, :length], atol=1e-5)
        seen += places
    assert sorted(seen) == list(range(len(rows)))


def test_padding_changes_nothing(backbone):
    members = stack_prompts([*map(Prompt, PROMPTS.values()), no_prompt(CONFIG)])
    lengths = [*LENGTHS.values(), 0]
    ((_, batch),) = mixed_batch.mixed_batches([[5, 6, 7, 1], [8, 1]], [0, 1], lengths, batch_size=2)
    wider = batch._replace(tokens=np.pad(batch.tokens, ((0, 0), (0, 20))))
    narrow, valid = encode_mixed(MODEL, backbone, members, batch)
    wide, still_valid = encode_mixed(MODEL, backbone, members, wider)
    width = valid.shape[1]
    np.testing.assert_array_equal(still_valid[:, :width], valid)
    assert not still_valid[:, width:].any()
    np.testing.assert_allclose(wide[:, :width][valid], narrow[valid], atol=1e-5)


# Texts


@pytest.mark.parametrize("num_decodes", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_mixed_batch_generates_what_separate_runs_do(predictor, backbone, num_decodes):
    rows, _ = predictor.tokenize(TEXTS)
    expected = []
    for text, name in zip(TEXTS, NAMES, strict=True):
        tokens, scores = generate_alone(
            MODEL,
            backbone,
            Prompt(jnp.asarray(prompt_of(name))),
            alone(predictor, text),
            length=LIMITS["max_target_length"],
            num_decodes=num_decodes,
        )
        expected.append((np.asarray(tokens[0]), float(scores[0])))
    # Ids, not text: a random model says much that no text shows.
    ((places, batch),) = predictor._batches(rows, NAMES)
    assert batch.tokens.shape == (8, 48)
    tokens, _ = mixed_batch.generate(
        backbone,
        predictor.members,
        batch,
        np.asarray([*places, *places[-1:] * (8 - len(places))], np.int32),
        model=predictor.model,
        search=decode.Search(6, num_decodes),
    )
    for place, found in zip(places, np.asarray(tokens)[:, -1], strict=False):
        np.testing.assert_array_equal(found, expected[place][0])
    assert len({tuple(ids) for ids, _ in expected}) > 3  # the rows do differ

    mixed = predictor.generate_rows(rows, NAMES, num_decodes=num_decodes)
    for found, (ids, score) in zip(mixed, expected, strict=True):
        assert found.text == ByteVocabulary().decode(ids)
        np.testing.assert_allclose(found.score, score, rtol=1e-5)
    texts = predictor.generate(TEXTS, NAMES, num_decodes=num_decodes)
    assert texts == [found.text for found in mixed]


def test_a_mixed_batch_scores_labels_as_evaluation_does(predictor, backbone):
    scores = predictor.score(TEXTS, LABELS, NAMES)
    assert scores.shape == (len(TEXTS), len(LABELS))
    labels = np.zeros((3, 6), np.int32)
    for row, label in zip(labels, LABELS, strict=True):
        ids = [*ByteVocabulary().encode(label), 1]
        row[: len(ids)] = ids
    for text, name, found in zip(TEXTS, NAMES, scores, strict=True):
        expected = score_alone(
            MODEL,
            backbone,
            Prompt(jnp.asarray(prompt_of(name))),
            alone(predictor, text),
            jnp.asarray(labels),
        )
        np.testing.assert_allclose(found, expected[0], rtol=1e-5)
    ranked = predictor.rank(TEXTS, LABELS, NAMES)
    assert ranked == [LABELS[i] for i in scores.argmax(axis=1)]


def test_prompts_matter_and_a_single_name_holds_for_all(predictor):
    scores = {name: predictor.score(TEXTS, LABELS, name) for name in (None, "long", "short")}
    assert np.abs(scores["long"] - scores["short"]).min() > 1e-3
    assert np.abs(scores["long"] - scores[None]).min() > 1e-3
    np.testing.assert_array_equal(scores["long"], predictor.score(TEXTS, LABELS, ["long"] * 6))


def test_without_prompts_it_is_the_model_itself(predictor, backbone):
    bare = Predictor(CONFIG, backbone, ByteVocabulary(), {}, **LIMITS)
    np.testing.assert_allclose(
        bare.score(TEXTS, LABELS, None), predictor.score(TEXTS, LABELS, None), rtol=1e-5
    )
    assert bare.generate([], None) == []
    with pytest.raises(ConfigError, match="'long'"):
        bare.generate(TEXTS, "long")


def test_few_shapes_are_compiled(backbone):
    """Every width and number of rows that is not compiled yet costs a user seconds."""
    predictor = Predictor(CONFIG, backbone, ByteVocabulary(), PROMPTS, **LIMITS)
    shapes = {
        batch.tokens.shape
        for rows in range(1, 20)
        for length in (1, 5, 9, 16, 17, 25, 30, 40, 47)
        for _, batch in predictor._batches([[5] * length] * rows, "long")
    }
    assert shapes == {(rows, width) for rows in (1, 2, 4, 8) for width in (16, 32, 48, 64)}


# Long texts


def test_a_long_text_is_cut_and_said_so(predictor):
    long, fits = ["x" * 48] * 6, ["x" * 47] * 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = predictor.generate(fits, None), predictor.rank(fits, LABELS, None)
    message = r"6 of 6 texts .*48 .*0, 1, 2, 3, 4, \.\.\."
    with pytest.warns(UserWarning, match=message) as warned:
        found = predictor.generate(long, None), predictor.rank(long, LABELS, None)
    assert found == expected
    assert [w.filename for w in warned] == [__file__] * 2
    with pytest.warns(UserWarning, match=message) as warned:
        predictor.score(long, LABELS, None)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=r"1 of 6 texts .* 2\."):
        predictor.generate([*fits[:2], long[0], *fits[:3]], None)
    rows, cut = predictor.tokenize([fits[0], long[0]])
    assert (rows[0], cut) == (rows[1], [1])
    assert rows[1][-1] == 1
    assert len(rows[1]) == 48


def test_characters_that_the_vocabulary_does_not_know_are_said(backbone):
    vocabulary = ByteVocabulary(unk_id=ByteVocabulary().encode("?")[0])
    predictor = Predictor(CONFIG, backbone, vocabulary, {}, max_target_length=2)
    with pytest.warns(UserWarning, match=r"1 of 2 have characters that the vocabulary") as warned:
        predictor.rank(["why?", "so."], LABELS, None)
    assert [w.filename for w in warned] == [__file__]


# What does not fit


def test_unknown_prompts_are_refused_with_the_nearest_names(predictor):
    with pytest.raises(ConfigError, match=r"'shrt'.*Did you mean short"):
        predictor.generate(TEXTS, [*NAMES[:-1], "shrt"])
    with pytest.raises(ConfigError, match="long, short"):
        predictor.rank(TEXTS, LABELS, "zzz")
    with pytest.raises(ConfigError, match=r"6 texts .*1 prompts"):
        predictor.score(TEXTS, LABELS, ["short"])


def test_misuse_is_named(predictor, backbone):
    with pytest.raises(ConfigError, match=r"\[text\]"):
        predictor.generate("a text", "short")
    for labels in ("yes", []):
        with pytest.raises(ConfigError, match="labels"):
            predictor.rank(TEXTS, labels, "short")
    with pytest.raises(ConfigError, match="batch_size"):
        Predictor(CONFIG, backbone, ByteVocabulary(), {}, batch_size=0)
    for shape in ((3, 7), (32,)):
        with pytest.raises(ConfigError, match=rf"the prompt p has shape \({shape[0]}, ?7?\)"):
            Predictor(CONFIG, backbone, ByteVocabulary(), {"p": np.zeros(shape, np.float32)})


def test_a_vocabulary_of_another_model_is_refused(backbone):
    large = ByteVocabulary(vocab_size=385)
    with pytest.raises(ConfigError, match=r"385 .*384"):
        Predictor(CONFIG, backbone, large, {})


# From files


@pytest.fixture(scope="module")
def files(tmp_path_factory, backbone):
    folder = tmp_path_factory.mktemp("served")
    t5x.write_t5x(folder / "checkpoint_5", backbone, 5)
    metadata = prompt_file.PromptMetadata(
        task="task",
        backbone=identity.backbone_identity(backbone),
        vocabulary=ByteVocabulary().sha256,
    )
    prompt_file.save_prompt(folder / "long", as_prompt(PROMPTS["long"]), metadata)
    np.save(folder / "short.npy", PROMPTS["short"])
    np.save(folder / "wide.npy", np.zeros((2, 40), np.float32))
    return folder


def test_from_checkpoint(files, predictor):
    paths = {"long": files / "long", "short": str(files / "short.npy")}
    loaded = Predictor.from_checkpoint(
        str(files / "checkpoint_5"), CONFIG, "bytes", paths, **LIMITS
    )
    np.testing.assert_allclose(
        loaded.score(TEXTS, LABELS, NAMES), predictor.score(TEXTS, LABELS, NAMES), rtol=1e-4
    )
    assert loaded.generate(TEXTS, NAMES) == predictor.generate(TEXTS, NAMES)
    # Eight devices share the rows.
    assert (
        len(loaded.backbone["token_embedder/embedding"].sharding.device_set) == jax.device_count()
    )


def test_prompts_of_another_backbone_or_vocabulary_are_refused(files, tmp_path, predictor):
    checkpoint = str(files / "checkpoint_5")

    def load(path, vocabulary="bytes"):
        return Predictor.from_checkpoint(checkpoint, CONFIG, vocabulary, {"p": path})

    with pytest.raises(ConfigError, match=r"wide\.npy .*\(2, 40\)"):
        load(files / "wide.npy")
    with pytest.raises(ConfigError, match="no prompt"):
        load(files / "nothing")
    for field in ("backbone", "vocabulary"):
        metadata = prompt_file.PromptMetadata(**{field: "0" * 64})
        prompt_file.save_prompt(tmp_path / field, as_prompt(PROMPTS["short"]), metadata)
        with pytest.raises(ConfigError, match=f"another {field}"):
            load(tmp_path / field)


# Devices and threads


@pytest.mark.parametrize("partitions", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_on_a_mesh_it_answers_as_on_one_device(predictor, backbone, partitions):
    mesh = sharding.make_mesh(partitions)
    placed = jax.device_put(backbone, sharding.param_shardings(backbone, mesh))
    spread = Predictor(CONFIG, placed, ByteVocabulary(), PROMPTS, **LIMITS)
    for _, batch in spread._batches([[5, 1]], "long"):
        assert batch.tokens.shape[0] % mesh.shape["data"] == 0
        parts = {str(shard.index) for shard in batch.tokens.addressable_shards}
        assert len(parts) == mesh.shape["data"]
    np.testing.assert_allclose(
        spread.score(TEXTS, LABELS, NAMES), predictor.score(TEXTS, LABELS, NAMES), rtol=1e-4
    )
    assert spread.generate(TEXTS, NAMES) == predictor.generate(TEXTS, NAMES)


def test_threads_share_a_predictor(predictor):
    expected = predictor.generate(TEXTS, NAMES)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(predictor.generate(TEXTS, NAMES)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
