"""gin files and flags become an experiment, or one message that says what is wrong and where.

The golden files are the resolved configurations of some documented commands; after a deliberate
change of the recipes: `python tests/test_gin_config.py` writes them anew.
"""

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path

import gin
import pytest
from beartype.roar import BeartypeException
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIG

from prompt_tuning import api, config
from prompt_tuning.checkpoints import architecture, huggingface
from prompt_tuning.config import (
    ConfigError,
    EvalRun,
    Experiment,
    InferRun,
    ModelConfig,
    generate,
    gin_files,
    gin_reader,
    runs,
)
from prompt_tuning.model import t5
from prompt_tuning.session.session import resolve_sizes

GIN = gin_files.gin_folder()
GOLDEN = Path(__file__).parent / "golden" / "config"
MODELS, INITS, TASKS = (
    [f"{folder}/{path.name}" for path in sorted((GIN / folder).glob("*.gin"))]
    for folder in ("models", "inits", "superglue")
)
FROM_CHECKPOINT = "models/from_checkpoint.gin"
MODELS.remove(FROM_CHECKPOINT)  # it has no sizes of its own
RECIPE = "runs/prompt_tune.gin"
WHERE = ["MODEL_DIR = 'out'", "INITIAL_CHECKPOINT_PATH = 'gs://bucket/checkpoint_1100000'"]
# What a file of inits/ leaves to the user.
INIT_NEEDS = {
    "inits/text.gin": ["PROMPT_TEXT = 'yes or no'"],
    "inits/from_file.gin": ["PROMPT_FILE = 'best'"],
}
COMMANDS = {
    "boolq_base": (
        ["models/t5_1_1_base.gin", "inits/class_labels.gin", "superglue/boolq.gin", RECIPE],
        WHERE,
    ),
    "cb_xxl_without_prompt_file": (
        ["models/t5_1_1_xxl.gin", "superglue/cb.gin", RECIPE],
        [*WHERE, "DTYPE = 'bfloat16'", "NUM_MODEL_PARTITIONS = 8"],
    ),
    "rte_small_model_tuning": (
        ["models/t5_1_1_small.gin", "superglue/rte.gin", "runs/model_tune.gin"],
        WHERE,
    ),
    "pretrain_small": (
        ["models/t5_1_1_small.gin", "runs/pretrain.gin"],
        ["MODEL_DIR = 'out'", "TEXT_FILES = 'corpus/*.txt'"],
    ),
    "lm_adapt_small": (
        ["models/t5_1_1_small.gin", "runs/lm_adapt.gin"],
        [*WHERE, "TEXT_FILES = 'corpus/*.txt'"],
    ),
    "demo": (["demo.gin"], []),
    "demo_topic": (["demo_topic.gin"], []),
}


def load(files, bindings=(), **options) -> Experiment:
    return gin_reader.load(files, bindings, **options).run


def refusal(files, bindings=(), **options) -> str:
    with pytest.raises(ConfigError) as error:
        gin_reader.load(files, bindings, **options)
    return str(error.value)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_byte_order_mark_is_skipped(tmp_path):
    write(tmp_path / "inner.gin", "\ufeffBATCH_SIZE = 8\n")
    outer = write(tmp_path / "outer.gin", "\ufeffinclude 'inner.gin'\nRANDOM_SEED = 7\n")
    run = load(["demo.gin", outer], search_paths=[str(tmp_path)])
    assert (run.data.batch_size, run.train.random_seed) == (8, 7)


# The project's own files


# A large model's file names what those of its family's smaller ones do; test_t5.py has the
# published counts.
LARGE = re.compile("large|xl|3b|11b")
every_model = pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[pytest.mark.slow] * bool(LARGE.search(m))) for m in MODELS],
)


@every_model
def test_every_combination_resolves_and_nothing_clobbers(model):
    """Every two of a model, an initialisation and a task: two files can clobber a macro."""
    number = MODELS.index(model)
    for i, task in enumerate(TASKS):
        init = INITS[(number + i) % len(INITS)]
        where = WHERE[:1] if "tiny" in model else WHERE
        bindings = [*where, *INIT_NEEDS.get(init, [])]
        loaded = gin_reader.load([model, init, task, RECIPE], bindings)
        assert loaded.overrides == ()
        experiment = loaded.run
        assert experiment.train.train_steps_relative == 30_000
        assert (
            experiment.prompt.init
            == {
                "class_labels": "class_labels",
                "from_file": "file",
                "random_uniform": "random_uniform",
                "sampled_vocab": "sampled_vocab",
                "text": "text",
            }[Path(init).stem]
        )
        name = experiment.data.mixture_or_task_name
        assert isinstance(name, str)
        assert Path(task).stem in name
        assert experiment.prompt.class_labels  # the words of the task


@pytest.mark.parametrize("init", INITS)
def test_the_old_names_of_the_initialisations_go_on(init):
    old = f"prompts/{Path(init).name}"
    bindings = INIT_NEEDS.get(init, [])
    assert load([old, "demo.gin"], bindings) == load([init, "demo.gin"], bindings)


def test_there_are_models_inits_and_tasks():
    assert len(MODELS) == 26
    assert len(INITS) == 5
    assert len(TASKS) == 11


@pytest.mark.parametrize("name", COMMANDS)
def test_golden(name):
    files, bindings = COMMANDS[name]
    assert gin_reader.to_gin(load(files, bindings)) == (GOLDEN / f"{name}.txt").read_text()


def count_parameters(model: ModelConfig) -> int:
    """From models of one and two layers: all of a stack's are alike."""

    def count(**layers: int) -> int:
        shapes = t5.param_shapes(dataclasses.replace(model, **layers))
        return sum(shape.size for shape in shapes.values())

    one = count(num_encoder_layers=1, num_decoder_layers=1)
    encoder = count(num_encoder_layers=2, num_decoder_layers=1) - one
    decoder = count(num_encoder_layers=1, num_decoder_layers=2) - one
    return one + (model.num_encoder_layers - 1) * encoder + (model.num_decoder_layers - 1) * decoder


@every_model
def test_model_files_say_their_parameter_count(model):
    (count,) = re.findall(r"([\d,]+) parameters", (GIN / model).read_text())
    found = load([model, RECIPE, "superglue/cb.gin"], WHERE).model
    assert count_parameters(found) == int(count.replace(",", ""))
    name = Path(model).stem
    in_python = api.model_config("tiny" if name == "t5_1_1_tiny" else name)
    assert found == dataclasses.replace(in_python, dropout_rate=found.dropout_rate)


def test_a_model_by_its_name_in_python():
    assert api.model_config("xl") == api.model_config("t5_1_1_xl")
    assert api.model_config("byt5_small").num_decoder_layers == 4
    assert api.model_config("t5_1_0_base").mlp_activations == ("relu",)
    with pytest.raises(ConfigError, match=r"'t5_1_1_bse'\. Did you mean t5_1_1_base\?"):
        api.model_config("t5_1_1_bse")
    with pytest.raises(ConfigError):
        api.model_config("from_checkpoint")


def test_sizes_may_come_from_the_checkpoint():
    def resolve(bindings, files=(FROM_CHECKPOINT, "superglue/cb.gin", RECIPE), run=Experiment):
        loaded = gin_reader.load(files, ["VOCABULARY = 'bytes'", *bindings], run=run)
        return resolve_sizes(loaded).run

    tiny = resolve(["MODEL_DIR = 'out'", "INITIAL_CHECKPOINT_PATH = 'tiny'"]).model
    assert tiny == dataclasses.replace(api.model_config("tiny"), dropout_rate=tiny.dropout_rate)
    stored = GOLDEN.parent / "hf"
    for family in ("t5_1_0", "mt5"):
        found = resolve(["MODEL_DIR = 'out'", f"INITIAL_CHECKPOINT_PATH = '{stored / family}'"])
        assert found.model == huggingface.open_folder(stored / family).model
        again = gin_reader.to_gin(found)  # config.gin has plain numbers
        assert "from_checkpoint" not in again
    scored = resolve(
        ["EVAL_OUTPUT_DIR = 'out'", f"CHECKPOINT_PATH = '{stored / 'byt5'}'"],
        [FROM_CHECKPOINT, "superglue/cb.gin", "runs/eval.gin"],
        EvalRun,
    )
    assert scored.model == huggingface.open_folder(stored / "byt5").model


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("INITIAL_CHECKPOINT_PATH = None", "Set INITIAL_CHECKPOINT_PATH"),
        ("DROPOUT_RATE = 'from_checkpoint'", "DROPOUT_RATE = 'from_checkpoint': a checkpoint"),
        ("BATCH_SIZE = 'from_checkpoint'", "BATCH_SIZE must be an integer"),
        ("PROMPT_LENGTH = 0", r"nothing to train.*\(PROMPT_LENGTH: the command line"),
    ],
)
def test_mistakes_beside_sizes_from_the_checkpoint(binding, message):
    files = [FROM_CHECKPOINT, "superglue/cb.gin", RECIPE]
    bindings = ["VOCABULARY = 'bytes'", "MODEL_DIR = 'out'", "INITIAL_CHECKPOINT_PATH = 'tiny'"]
    with pytest.raises(ConfigError, match=message):
        _ = resolve_sizes(gin_reader.load(files, [*bindings, binding])).run


def test_reading_settings_opens_no_checkpoint():
    files = [FROM_CHECKPOINT, "superglue/cb.gin", RECIPE]
    where = ["VOCABULARY = 'bytes'", "MODEL_DIR = 'o'", "INITIAL_CHECKPOINT_PATH = 'nowhere'"]
    loaded = gin_reader.load(files, where)
    assert set(loaded.open_sizes) == {*architecture.SIZES, *architecture.FORM}
    with pytest.raises(ConfigError, match="there is no T5X checkpoint at"):
        resolve_sizes(loaded)


def test_models_inits_and_tasks_hold_macros_only():
    for folder in ("models", "inits", "superglue"):
        for path in (GIN / folder).glob("*.gin"):
            for line in path.read_text().splitlines():
                assert re.match(r"(#.*|[A-Z0-9_]+ = .*|)$", line), (path, line)


@pytest.mark.parametrize("file", generate.write_files(GIN.parent), ids=lambda file: file.name)
def test_what_is_written_of_the_settings_is_current(file):
    """If not: `python -m prompt_tuning.config.generate`."""
    assert file.read_text() == generate.write_files(GIN.parent)[file]


def test_every_macro_says_what_it_is_and_has_one_default():
    stated = runs.macros()
    for run in runs.RUNS:
        for leaf in runs.run_settings(run):
            known = stated[leaf.macro.name]
            assert known.macro.help, leaf
            assert known.default == leaf.default, leaf
            assert known.macro.fallback == leaf.macro.fallback, leaf


def test_defaults_are_those_of_the_dataclasses():
    task = ["MIXTURE_OR_TASK_NAME = 'a_task'", "TASK_FEATURE_LENGTHS = {'inputs': 9, 'targets': 2}"]
    found = load(
        ["models/t5_1_1_base.gin", "runs/bindings.gin"], [*WHERE, *task, "TRAIN_STEPS_RELATIVE = 1"]
    )
    required = [
        f.name for f in dataclasses.fields(config.ModelConfig) if f.default is dataclasses.MISSING
    ]
    needed = {name: getattr(found.model, name) for name in required}
    assert found == Experiment(
        model_dir="out",
        initial_checkpoint_path="gs://bucket/checkpoint_1100000",
        model=config.ModelConfig(**needed),
        data=config.DataConfig(
            mixture_or_task_name="a_task", task_feature_lengths={"inputs": 9, "targets": 2}
        ),
        train=config.TrainConfig(train_steps_relative=1),
    )


def test_the_recipe_is_the_papers():
    experiment = load(["demo.gin", RECIPE])
    optimizer = experiment.optimizer
    assert (experiment.train.train_steps_relative, experiment.data.batch_size) == (30_000, 32)
    assert (experiment.prompt.length, optimizer.learning_rate) == (100, 0.3)
    assert (optimizer.name, optimizer.decay_rate) == ("adafactor", 0.8)
    assert (optimizer.weight_decay, optimizer.start_step) == (1e-5, None)
    assert (experiment.model.dropout_rate, experiment.train.z_loss) == (0.1, 1e-4)
    assert experiment.eval.period == 1000


# Later ones win, and say so


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    mine = write(tmp_path / "mine.gin", "BATCH_SIZE = 8\nLEARNING_RATE = 0.1\n")
    loaded = gin_reader.load(["demo.gin", mine], ["LEARNING_RATE = 1"])
    assert loaded.run.data.batch_size == 8
    assert loaded.run.optimizer.learning_rate == 1.0
    assert type(loaded.run.optimizer.learning_rate) is float
    lines = [str(override) for override in loaded.overrides]
    recipe = (GIN / RECIPE).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(recipe) if text.startswith("BATCH_SIZE"))
    assert f"BATCH_SIZE = 32 ({RECIPE}:{line}) is overridden by 8 ({mine}:1)" in lines
    assert f"LEARNING_RATE = 0.1 ({mine}:2) is overridden by 1 (the command line)" in lines


def test_the_same_value_again_and_defaults_are_no_override(tmp_path):
    mine = write(tmp_path / "mine.gin", "BATCH_SIZE = 32\nNUM_DECODES = 4\n")
    ours = {str(o) for o in gin_reader.load(["demo.gin"]).overrides}
    assert {str(o) for o in gin_reader.load(["demo.gin", mine]).overrides} == ours
    required = write(tmp_path / "required.gin", "NUM_DECODES = %gin.REQUIRED\n")
    loaded = gin_reader.load(["demo.gin", required], ["NUM_DECODES = 2"])
    assert {str(o) for o in loaded.overrides} == ours


def test_overriding_within_one_file_is_named(tmp_path):
    mine = write(tmp_path / "mine.gin", "NUM_DECODES = 4\nNUM_DECODES = 2\n")
    (line,) = (str(o) for o in gin_reader.load(["demo.gin", mine]).overrides if "DECODES" in str(o))
    assert line == f"NUM_DECODES = 4 ({mine}:1) is overridden by 2 ({mine}:2)"


def test_absolute_steps_on_the_command_line_replace_the_recipes_relative_ones():
    loaded = gin_reader.load(["demo.gin"], ["TRAIN_STEPS = 1100600"])
    assert loaded.run.train.train_steps == 1_100_600
    assert loaded.run.train.train_steps_relative is None
    assert re.fullmatch(
        r"TRAIN_STEPS_RELATIVE = 600 \(demo.gin:\d+\) is overridden by "
        r"TRAIN_STEPS = 1100600 \(the command line\)",
        str(loaded.overrides[-1]),
    )


def test_a_later_file_may_turn_absolute_steps_into_relative_ones(tmp_path):
    mine = write(tmp_path / "mine.gin", "TRAIN_STEPS = 1130000\n")
    assert load([mine, "demo.gin"]).train.train_steps_relative == 600
    assert load(["demo.gin", mine]).train.train_steps == 1_130_000


def test_both_kinds_of_steps_in_one_place_are_refused(tmp_path):
    message = refusal(["demo.gin"], ["TRAIN_STEPS = 9", "TRAIN_STEPS_RELATIVE = 3"])
    assert "TRAIN_STEPS (9) and TRAIN_STEPS_RELATIVE (3) are both set. Set one" in message
    mine = write(tmp_path / "mine.gin", "TRAIN_STEPS = 9\nTRAIN_STEPS_RELATIVE = 3\n")
    message = refusal(["demo.gin", mine])
    assert f"(TRAIN_STEPS: {mine}:1; TRAIN_STEPS_RELATIVE: {mine}:2)" in message


def test_a_file_or_a_text_says_how_the_prompt_begins():
    assert load(["demo.gin"]).prompt.init == "auto"
    loaded = gin_reader.load(["demo.gin"], ["PROMPT_FILE = 'x.npy'"])
    assert loaded.run.prompt.init == loaded.macros["PROMPT_INIT"] == "file"
    assert str(loaded.provenance["PROMPT_INIT"]) == "the command line"
    assert load(["demo.gin"], ["PROMPT_TEXT = 'a b'"]).prompt.init == "text"
    assert "are both set" in refusal(["demo.gin"], ["PROMPT_TEXT = 'a b'", "PROMPT_FILE = 'x'"])
    message = refusal(["inits/class_labels.gin", "demo.gin"], ["PROMPT_FILE = 'x'"])
    assert "PROMPT_FILE is set ('x'), but PROMPT_INIT is 'class_labels'" in message
    assert "PROMPT_INIT: inits/class_labels.gin:" in message


# Values


plain = st.none() | st.booleans() | st.integers() | st.floats(-1e30, 1e30) | st.text(max_size=8)
method_settings = plain | st.lists(plain, max_size=2) | st.lists(plain, max_size=2).map(tuple)


def test_lists_become_tuples_and_numbers_are_gin_literals():
    experiment = load(
        ["demo.gin"],
        [
            "CLASS_LABELS=['a', 'b']",
            "MIXTURE_OR_TASK_NAME=['tiny_mood', 'tiny_topic']",
            "TRAIN_STEPS_RELATIVE = 30_000",
            "WEIGHT_DECAY = 1e-3",
        ],
    )
    assert experiment.prompt.class_labels == ("a", "b")
    assert experiment.data.names == ("tiny_mood", "tiny_topic")
    assert experiment.train.train_steps_relative == 30_000
    assert experiment.optimizer.weight_decay == 1e-3


METHOD = """
import dataclasses
from prompt_tuning.methods import prompt_tuning

@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 8
    rates: tuple[float, ...] = ()
    name: str | None = None

METHOD = prompt_tuning.METHOD._replace(Settings=Settings)
"""


def test_settings_of_a_method_of_the_users_own(tmp_path, monkeypatch):
    write(tmp_path / "my_method.py", METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    own = "PROMPT_METHOD = 'my_method.METHOD'"
    values = "PROMPT_SETTINGS = {'width': 2, 'rates': [0.5, 1.0], 'name': None}"
    found = load(["demo.gin"], [own, values])
    assert list(found.prompt.settings.items()) == [
        ("name", None),
        ("rates", (0.5, 1.0)),
        ("width", 2),
    ]
    saved = write(tmp_path / "config.gin", gin_reader.to_gin(found))
    assert load([saved]) == found
    message = refusal(["demo.gin"], [own, "PROMPT_SETTINGS = {'widht': 2}"])
    assert "Did you mean width?" in message
    assert "PROMPT_SETTINGS: the command line" in message
    message = refusal(["demo.gin"], [own, "PROMPT_SETTINGS = {'width': 2.0}"])
    assert "Expected an integer" in message


@given(values=st.dictionaries(st.text(max_size=8), method_settings, max_size=3))
@settings(deadline=None)
def test_settings_of_a_method_are_stored_and_read_back(values):
    prompt = config.PromptConfig(settings=values)
    stored = json.dumps(config.to_dict(prompt), sort_keys=True)
    assert config.from_dict(config.PromptConfig, json.loads(stored)) == prompt
    assert list(prompt.settings) == sorted(values)
    assert ast.literal_eval(repr(dict(prompt.settings))) == prompt.settings


def test_lists_are_tuples_where_gin_alone_makes_the_object():
    """As in T5X's own program, which knows nothing of our macros."""
    model = dataclasses.replace(CONFIG, mlp_activations=["relu"])
    assert model == dataclasses.replace(CONFIG, mlp_activations=("relu",))
    with pytest.raises(BeartypeException, match="mlp_activations"):
        dataclasses.replace(CONFIG, mlp_activations=["sigmoid"])


def test_macros_may_refer_to_macros_and_be_the_users_own():
    experiment = load(["demo.gin"], ["SIZE = 7", "BATCH_SIZE = %SIZE", "EVAL_BATCH_SIZE = %SIZE"])
    assert (experiment.data.batch_size, experiment.eval.batch_size) == (7, 7)


def test_fields_may_be_bound_directly():
    assert load(["demo.gin"], ["OptimizerConfig.decay_rate = 0.5"]).optimizer.decay_rate == 0.5


def test_a_users_module_may_supply_values(tmp_path, monkeypatch):
    write(
        tmp_path / "my_words.py",
        "import gin\n\n@gin.configurable\ndef my_labels(first='x'):\n    return [first, 'no']\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = write(
        tmp_path / "mine.gin",
        "import my_words\nCLASS_LABELS = @my_labels()\nmy_labels.first = 'yes'\n",
    )
    assert load(["demo.gin", mine]).prompt.class_labels == ("yes", "no")
    assert "cannot read `my_labels.second" in refusal(["demo.gin", mine], ["my_labels.second = 1"])


def test_gins_own_state_is_left_empty_and_does_not_matter():
    gin.bind_parameter("ModelConfig.num_heads", 99)
    gin.finalize()
    assert load(["demo.gin"]).model.num_heads == 4
    assert gin.config_str().strip() == ""
    assert not gin.config_is_locked()
    with pytest.raises(ConfigError):
        load(["demo.gin"], ["BATCH_SIZE = 'x'"])
    assert gin.config_str().strip() == ""


def test_t5x_settings_that_change_nothing_are_accepted():
    harmless = ["USE_CACHED_TASKS = False", "USE_HARDWARE_RNG = False", "EVAL_STEPS = None"]
    assert load(["demo.gin"], harmless) == load(["demo.gin"])
    loaded = gin_reader.load(["demo.gin"], ["EVAL_STEPS = 20"], engine="t5x")
    assert loaded.macros["EVAL_STEPS"] == 20


@pytest.mark.parametrize("engine", ["embedded", "t5x"])
def test_both_engines_read_the_same_rows_in_the_same_order(engine):
    message = refusal(["demo.gin"], ["SHUFFLE_TRAIN_EXAMPLES = False"], engine=engine)
    assert "with either engine: the order of the rows follows from RANDOM_SEED" in message


# Eval and infer


def test_eval_takes_a_runs_configuration(tmp_path):
    text = gin_reader.to_gin(load(["demo.gin"], ["BATCH_SIZE = 16", "CLASS_LABELS = ['a']"]))
    saved = write(tmp_path / "config.gin", text)
    run = load(
        [saved, "runs/eval.gin"], ["EVAL_OUTPUT_DIR = 'o'", "PROMPT_FILE = 'best'"], run=EvalRun
    )
    assert (run.checkpoint_path, run.eval_output_dir, run.prompt_file) == ("tiny", "o", "best")
    assert (run.data.batch_size, run.class_labels) == (16, ("a",))
    assert run.checkpoint == "tiny"
    assert run.class_labels == ("a",)
    assert load([write(tmp_path / "eval.gin", gin_reader.to_gin(run))], run=EvalRun) == run


def test_checkpoint_path_wins_over_where_the_training_began():
    bindings = ["EVAL_OUTPUT_DIR = 'o'", "CHECKPOINT_PATH = 'gs://b/checkpoint_9'"]
    run = load(["demo.gin", "runs/eval.gin"], bindings, run=EvalRun)
    assert run.checkpoint_path == "gs://b/checkpoint_9"


def test_eval_takes_several_prompts_and_training_one(tmp_path):
    bindings = ["EVAL_OUTPUT_DIR = 'o'", "PROMPT_FILE = ['a', 'b']"]
    run = load(["demo.gin", "runs/eval.gin"], bindings, run=EvalRun)
    assert run.prompt_file == ("a", "b")
    assert load([write(tmp_path / "eval.gin", gin_reader.to_gin(run))], run=EvalRun) == run
    assert "PROMPT_FILE must be a string, found ('a', 'b')" in refusal(["demo.gin"], bindings[1:])


def test_infer_with_fallbacks():
    files = ["models/t5_1_1_tiny.gin", "runs/infer.gin"]
    lengths = ["TASK_FEATURE_LENGTHS = {'inputs': 9, 'targets': 2}"]
    fallbacks = {"MIXTURE_OR_TASK_NAME": (), "INFER_OUTPUT_DIR": ""}
    run = load(files, lengths, run=InferRun, fallbacks=fallbacks)
    assert (run.data.names, run.infer_output_dir) == ((), "")
    task = ["MIXTURE_OR_TASK_NAME = 'tiny_mood'"]
    assert load(files, lengths + task, run=InferRun, fallbacks=fallbacks).data.names == (
        "tiny_mood",
    )
    message = refusal(files, lengths, run=InferRun)
    assert "INFER_OUTPUT_DIR: " in message
    assert "MIXTURE_OR_TASK_NAME: " in message
    assert "CHECKPOINT_PATH" not in message


# Mistakes: what, where, and the nearest right one


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("LEARNIG_RATE = 0.1", r"LEARNIG_RATE.*Did you mean LEARNING_RATE"),
        ("learning_rate = 0.1", r"learning_rate.*LEARNING_RATE"),
        ("EVAL_NUM_EXAMPLES = 3", r"EVALUATOR_NUM_EXAMPLES"),
        ("train/BATCH_SIZE = 3", r"train/BATCH_SIZE.* BATCH_SIZE"),
        ("BATCH_SIZE = %BATCHSIZE", r"%BATCHSIZE.*BATCH_SIZE"),
        ("ModelConfig.num_head = 3", r"ModelConfig.*num_head\b.*num_heads"),
        ("OptimConfig.name = 3", r"OptimConfig.*OptimizerConfig"),
        ("train.eval_period = 5", r"train"),
        ("EVAL_STEPS = 5", r"EVAL_STEPS.*EVALUATOR_NUM_EXAMPLES"),
        ("BATCH_SIZE = '32'", r"BATCH_SIZE.*'32'"),
        ("BATCH_SIZE = 32.0", r"BATCH_SIZE.*32\.0"),
        ("BATCH_SIZE = True", r"BATCH_SIZE.*True"),
        ("LEARNING_RATE = '0.1'", r"LEARNING_RATE.*'0\.1'"),
        ("MODEL_DIR = 3", r"MODEL_DIR.*3"),
        ("EVAL_BATCH_SIZE = 'x'", r"EVAL_BATCH_SIZE.*'x'"),
        ("EVAL_BASELINES = 1", r"EVAL_BASELINES.*1"),
        ("DTYPE = 'float16'", r"'float32', 'bfloat16'.*'float16'"),
        ("CLASS_LABELS = [1]", r"CLASS_LABELS.*\(1,\)"),
        ("CLASS_LABELS = ['a', 'b', 'c', 4]", r"CLASS_LABELS"),
        ("TASK_FEATURE_LENGTHS = {'inputs': 3, 'targets': '4'}", r"TASK_FEATURE_LENGTHS"),
        ("CLASS_LABELS = 'yes'", r"CLASS_LABELS.*'yes'"),
        (
            "PROMPT_METHOD = 'promt_tuning'",
            r"PROMPT_METHOD = 'promt_tuning': .* Did you mean prompt_tuning\?.*\(PROMPT_METHOD: ",
        ),
        ("PROMPT_SETTINGS = {'x': 1}", r"names 'x': .* no such setting.*\(PROMPT_SETTINGS: "),
        ("PROMPT_METHOD = 3", r"PROMPT_METHOD.*3"),
        ("PROMPT_SETTINGS = 3", r"PROMPT_SETTINGS.*3"),
        ("PROMPT_SETTINGS = {3: 1}", r"PROMPT_SETTINGS"),
        ("PROMPT_SETTINGS = {'a': {}}", r"'a'.*\{\}.*PROMPT_SETTINGS"),
        ("PROMPT_SETTINGS = {'a': [1e999]}", r"'a'.*inf"),
        ("TASK_FEATURE_LENGTHS = 3", r"TASK_FEATURE_LENGTHS.*3"),
        ("TASK_FEATURE_LENGTHS = {'inputs': 3}", r"\{'inputs': T, 'targets': L\}"),
        ("BATCH_SIZE = 0", r"BATCH_SIZE = 0: .* Expected at least 1.* \(BATCH_SIZE: "),
        (f"BATCH_SIZE = -{'9' * 400}", r"BATCH_SIZE = -9+: .* Expected at least 1"),
        ("ALPHA = 1e999", r"ALPHA = inf: .* Expected a finite number"),
        ("NUM_HEADS = 0", r"NUM_HEADS = 0: .* Expected at least 1.* \(NUM_HEADS: "),
        ("EVAL_PERIOD = 0", r"EVAL_PERIOD = 0: .* Expected at least 1.* \(EVAL_PERIOD: "),
        ("TRAIN_STEPS = %TRAIN_STEPS", r"circle"),
        ("MODEL_DIR = runs/x", r"quotes.*--gin.MODEL_DIR=\"'runs/boolq'\""),
        ("MODEL_DIR = /runs/x", r"quotes"),
        ("MODEL_DIR =", r"`MODEL_DIR =`"),
        ("EVAL_BASELINES = false", r"False"),
        ("CLASS_LABELS = ['a'", r"`CLASS_LABELS = \['a'`"),
        ("BATCH_SIZE 3", r"expected ':' or '='"),
        ("VOCABULARY = @seqio.ByteVocabulary()", r"@seqio.ByteVocab"),
        ("import no_such_module_here", r"no_such_module_here"),
        ("from __gin__ import dynamic_registration", r"upstream T5X"),
        ("include 'models/t5_1_1_bas.gin'", r"models/t5_1_1_base\.gin"),
        ("MODEL_DIR = %gin.REQUIRED", r"1 macro .*no value.*\n  MODEL_DIR: "),
        ("ModelConfig.num_heads = %gin.REQUIRED", r"ModelConfig.num_heads"),
        ("TRAIN_STEPS_RELATIVE = None", r"TRAIN_STEPS_RELATIVE: "),
    ],
)
def test_mistakes_on_the_command_line(binding, message):
    found = refusal(["demo.gin"], [binding])
    assert re.search(message, found, flags=re.DOTALL), found
    if "no value" not in found and "circle" not in found and "not found" not in found:
        assert "the command line" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nLEARNIG_RATE = 1\n", r"mine.gin:2: .*LEARNIG_RATE"),
        ("\n\nBATCH_SIZE = 'x'\n", r"mine.gin:3: .*BATCH_SIZE"),
        ("\nBATCH_SIZE = 0\n", r"\(BATCH_SIZE: .*mine.gin:2\)"),
        ("# x\nBATCH_SIZE = oops\n", r"mine.gin:2: .*`BATCH_SIZE = oops`"),
        ("BATCH_SIZE = 1\nA B\n", r"mine.gin:2: .*`A B`"),
        ("NUM_DECODES = 1\nX = @nowhere()\n", r"mine.gin:2: .*`X = @nowhere\(\)`"),
        ("CLASS_LABELS = ['a',\n  'b'\n", r"mine.gin:2: "),
        ("ModelConfig:\n  num_head = 3\n", r"mine.gin:2: .*num_head"),
        ("\nfrom __gin__ import dynamic_registration\n", r"mine.gin:2: "),
        ("include 'mine.gin'\n", r"mine.gin -> mine.gin"),
    ],
)
def test_mistakes_in_a_file(text, message, tmp_path):
    write(tmp_path / "mine.gin", text)
    found = refusal(["demo.gin", "mine.gin"], search_paths=[str(tmp_path)])
    assert re.search(message, found), found


def test_all_mistakes_are_named_at_once():
    found = refusal(["demo.gin"], ["BATCH_SIZE = 'x'", "DTYPE = 1", "MODEL_DIR = %gin.REQUIRED"])
    assert all(name in found for name in ("BATCH_SIZE must", "DTYPE must", "MODEL_DIR: where"))
    found = refusal(["demo.gin"], ["BTCH_SIZE = 1", "ModelConfig.num_head = 2"])
    assert "BATCH_SIZE" in found
    assert "num_heads" in found


def test_what_is_open_is_listed_with_what_it_is():
    found = refusal(["superglue/boolq.gin", RECIPE])
    assert "MODEL_DIR: where the run writes" in found
    assert "NUM_ENCODER_LAYERS, NUM_DECODER_LAYERS" in found
    assert "set by a file of models/" in found
    assert "MIXTURE" not in found


def test_without_a_file_of_runs():
    assert "--gin_file=runs/prompt_tune.gin" in refusal(["models/t5_1_1_tiny.gin"])
    assert "what kind of run" in refusal(["models/t5_1_1_tiny.gin"], ["Experiment.model_dir = 'x'"])


# Files


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("models/t5_1_1_bas.gin", "Did you mean models/t5_1_1_base.gin"),
        ("boolq.gin", r"Did you mean superglue/boolq.gin\?"),
        ("prompt_tune.gin", r"Did you mean runs/prompt_tune.gin"),
        ("models", "Searched in "),
        ("/nowhere/demo.gin", r"Searched in /nowhere. Did you mean demo.gin\?"),
    ],
)
def test_missing_files_name_the_places_and_the_nearest(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = refusal([name], search_paths=["more"])
    assert f"gin file {name} not found" in found
    assert re.search(near, found), found
    if not name.startswith("/"):
        assert f"{tmp_path}, {tmp_path / 'more'}, {GIN}" in found


def test_a_missing_file_of_the_users_own_names_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine" / "experiment_1.gin", "")
    assert "Did you mean mine/experiment_1.gin?" in refusal(["mine/experiment1.gin"])
    assert f"Did you mean {tmp_path}/mine/experiment_1.gin?" in refusal(
        [f"{tmp_path}/mine/experiment1.gin"]
    )


def test_working_directory_then_search_paths_then_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "models/t5_1_1_tiny.gin"
    assert gin_files.find_file(name) == GIN / name
    write(tmp_path / "more" / name, "")
    assert gin_files.find_file(name, ["more"]) == Path("more") / name
    write(tmp_path / name, "")
    assert gin_files.find_file(name, ["more"]) == Path(name)


def test_own_defaults_and_bindings_are_not_taken_from_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "defaults.gin", "NONSENSE = 1\n")
    expected = load(["demo.gin"])
    monkeypatch.chdir(tmp_path)
    assert load(["demo.gin"]) == expected


def test_gin_folder_of_a_wheel_and_of_a_checkout(tmp_path):
    package = tmp_path / "prompt_tuning"
    with pytest.raises(ConfigError):
        gin_files.gin_folder(package)
    write(tmp_path / "gin" / "defaults.gin", "")
    assert gin_files.gin_folder(package) == tmp_path / "gin"
    write(package / "gin" / "defaults.gin", "")
    assert gin_files.gin_folder(package) == package / "gin"


def test_no_package_named_gin_beside_the_experiments():
    assert not list(GIN.rglob("*.py"))


# config.gin can be fed back


words = st.text(max_size=8)
positive = st.integers(1, 10**6)
numbers = st.floats(1e-30, 1e30)


@st.composite
def values_of_an_experiment(draw) -> dict:
    sizes = ["num_encoder_layers", "num_decoder_layers", "num_heads", "head_dim", "embed_dim"]
    sizes += ["mlp_dim", "num_embeddings"]
    init = draw(st.sampled_from(["auto", "random_uniform", "class_labels", "text", "file"]))
    return {
        "model_dir": draw(words),
        "initial_checkpoint_path": draw(words),
        "model": {
            **{name: draw(positive) for name in sizes},
            "dropout_rate": draw(st.floats(0, 0.99)),
            "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        },
        "data": {
            "mixture_or_task_name": draw(words | st.lists(words, max_size=3)),
            "mixture_or_task_module": draw(st.none() | words),
            "task_feature_lengths": {"inputs": draw(positive), "targets": draw(positive)},
            "vocabulary": draw(words),
            "tfds_data_dir": draw(st.none() | words),
        },
        "prompt": {
            "length": draw(positive),
            "init": init,
            "class_labels": draw(st.lists(words, max_size=3)),
            "text": draw(st.text(min_size=1)) if init == "text" else "",
            "file": draw(st.text(min_size=1)) if init == "file" else "",
            "scale": draw(st.floats(-1e9, 1e9)),
        },
        "optimizer": {
            "name": draw(st.sampled_from(["adafactor", "adamw"])),
            "learning_rate": draw(numbers),
            "weight_decay": draw(numbers),
            "start_step": draw(st.none() | positive),
        },
        "train": {
            draw(st.sampled_from(["train_steps", "train_steps_relative"])): draw(positive),
            "random_seed": draw(st.integers(0, 2**32 - 1)),
        },
        "eval": {
            "method": draw(st.sampled_from(["generate", "rank", "both"])),
            "num_examples": draw(st.none() | positive),
            "baselines": draw(st.booleans()),
        },
        "num_model_partitions": draw(positive),
    }


@given(values=values_of_an_experiment())
@settings(max_examples=60, deadline=None)
def test_round_trip(values, tmp_path_factory):
    experiment = config.from_dict(Experiment, values)
    path = tmp_path_factory.mktemp("round_trip") / "config.gin"
    path.write_text(gin_reader.to_gin(experiment), encoding="utf-8")
    loaded = gin_reader.load([str(path)])
    assert loaded.run == experiment
    assert loaded.overrides == ()
    assert gin_reader.to_gin(loaded.run) == path.read_text(encoding="utf-8")


def test_a_saved_configuration_can_be_changed_again(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(gin_reader.to_gin(load(["demo.gin"])))
    loaded = gin_reader.load([str(path)], ["TRAIN_STEPS_RELATIVE = 900", "PROMPT_LENGTH = 5"])
    assert loaded.run.train.train_steps_relative == 900
    assert loaded.run.prompt.length == 5
    assert [str(o).split(" (")[0] for o in loaded.overrides] == [
        "TRAIN_STEPS_RELATIVE = 600",
        "PROMPT_LENGTH = 20",
    ]


def test_provenance_is_shown_and_is_still_a_gin_file(tmp_path):
    loaded = gin_reader.load(["demo.gin"], ["BATCH_SIZE = 16"])
    text = gin_reader.to_gin(loaded.run, loaded.provenance)
    assert "\nBATCH_SIZE = 16  # the command line\n" in text
    assert "\nNUM_DECODES = 1  # the default\n" in text
    assert re.search(r"\nNUM_HEADS = 4  # models/t5_1_1_tiny.gin:\d+\n", text)
    assert load([write(tmp_path / "c.gin", text)]) == loaded.run


def write_golden() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, (files, bindings) in COMMANDS.items():
        (GOLDEN / f"{name}.txt").write_text(gin_reader.to_gin(load(files, bindings)))


if __name__ == "__main__":
    sys.exit(write_golden())
