"""The notebooks: their structure, and each of them executed from top to bottom."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tiny_models import random_params

from prompt_tuning import load_prompt
from prompt_tuning.checkpoints import t5x
from prompt_tuning.checkpoints.conversion import convert
from prompt_tuning.config import ModelConfig
from prompt_tuning.evaluation.records import read_records
from prompt_tuning.tasks.prepare import prepare_superglue
from prompt_tuning.world import assets, generator

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "notebooks"))
import build  # noqa: E402

sys.path.pop()

NAMES = ("prompt_tuning", "real_t5", "your_own_method")
METHODS = ("accuracy/generate", "accuracy/rank")
NOISE = r"TF-TRT|oneDNN|cuInit|computation_placer|absl::Init|TensorFlow binary|[IWE]\d{4} |Warning"


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


# Structure.


def test_these_are_the_notebooks():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_address_and_install_cell_are_those_of_setup(name):
    notebook = read(name)
    assert build.render(notebook, name) == notebook, "run python notebooks/build.py"
    address = build.read_address().removeprefix("https://github.com/")
    assert f"/github/{address}/blob/main/notebooks/{name}.ipynb" in notebook.cells[0].source
    assert f"git+{build.read_address()}" in build.find(notebook, "install").source


@pytest.mark.parametrize("name", NAMES)
def test_parameters_stand_first_and_installing_is_one_of_them(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags", []) for cell in code[:2]] == [["parameters"], ["install"]]
    assert code[0].source.startswith("INSTALL = True ")
    values: dict = {}
    exec(code[0].source, values)
    assert not any(re.search("pip install", cell.source) for cell in code[2:])


@pytest.mark.parametrize("name", build.STORED)
def test_outputs_are_stored_without_noise(name):
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[2:])
    assert not re.search(NOISE, printed(notebook))
    assert not re.search(r"\r|/tmp/|/home/", printed(notebook))
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)


def test_parameters_are_set_by_name():
    changed = build.set_parameters(read("real_t5"), STEPS=7, BACKBONE="a'b")
    values: dict = {}
    exec(build.find(changed, "parameters").source, values)
    assert (values["STEPS"], values["BACKBONE"], values["INSTALL"]) == (7, "a'b", True)
    with pytest.raises(AssertionError, match="STEP is no parameter"):
        build.set_parameters(read("real_t5"), STEP=7)


def test_outputs_are_stored_as_a_screen_shows_them():
    pieces = ["10%\r20", "%\r30%\n", "/x/y/runs\n"]
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in pieces]
    (joined,) = build.join_streams(outputs)
    assert build.clean(joined, Path("/x/y")).text == "30%\nruns\n"


def test_your_own_method_has_the_cells_of_its_page():
    page = (ROOT / "docs" / "your_own_method.md").read_text()
    code = [cell.source for cell in read("your_own_method").cells if cell.cell_type == "code"]
    method, trial = re.findall(r"```python\n(.*?)\n```", page, flags=re.DOTALL)
    assert "%%writefile my_module.py\n" + method in code
    assert any(source.startswith(trial) for source in code)
    for command in re.findall(r"```bash\n(.*?)\n```", page, flags=re.DOTALL):
        # IPython fills in what stands in braces.
        shown = "!" + command.replace("{", "{{").replace("}", "}}")
        assert any(source.startswith(shown) for source in code)


def test_the_demo_has_the_numbers_of_the_readme():
    """The first table of the README is that of the notebook's command."""
    readme = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"```\n(tiny_mood .*?\ntuned, last.*?)\n", readme, flags=re.DOTALL)
    rows = [re.split(r"  +", line) for line in table.splitlines()]
    stored = printed(read("prompt_tuning"))
    for row in rows[1:3]:  # the last digits of a tuned prompt depend on the processor
        assert re.search(" +".join(map(re.escape, row)) + "\n", stored)


# The demo and your own method, executed.


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo with its outputs, and the folder it ran in; half of the steps teach as much."""
    folder = tmp_path_factory.mktemp("demo")
    notebook = build.set_parameters(read("prompt_tuning"), INSTALL=False, STEPS=300)
    return build.execute(notebook, folder), folder


@pytest.mark.slow
def test_it_shows_the_table_the_curve_and_the_answers(demo):
    notebook, folder = demo
    text = printed(notebook)
    assert "majority class" in text
    assert "not learning" not in text
    assert not re.search(NOISE, text)
    right = [line for line in text.splitlines() if "(right: " in line]
    assert len(right) == 8
    agree = [line.split("'")[1] == line.split("(right: ")[1].split(")")[0] for line in right]
    assert sum(agree) >= 7
    assert pictures(notebook) == 1
    assert (folder / "runs" / "mood" / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mood", "topic"])
def test_the_prompt_teaches_the_task(demo, task):
    """At least 90 % by generation and by ranking, where chance is 50 %."""
    _, folder = demo
    records = read_records(folder / "runs" / task / "metrics.jsonl")
    for method in METHODS:
        tuned = [r["value"] for r in records if r["name"] == method and "prompt" not in r]
        base = {r["prompt"]: r["value"] for r in records if r["name"] == method and "prompt" in r}
        assert max(tuned) >= 90.0
        assert base["majority"] == 50.0
        assert base["none"] == 0.0 or (method == "accuracy/rank" and 35.0 < base["none"] < 65.0)


@pytest.mark.slow
def test_swapped_prompts_are_useless(demo):
    _, folder = demo
    records = read_records(folder / "runs" / "swapped" / "metrics.jsonl")
    for prompt in ("mood", "topic"):
        for task in ("mood", "topic"):
            generated, ranked = (
                next(
                    r["value"]
                    for r in records
                    if f"/{prompt}/" in r["prompt"]
                    and r["task"] == f"tiny_{task}"
                    and r["name"] == method
                )
                for method in METHODS
            )
            if prompt == task:
                assert min(generated, ranked) >= 90.0
            else:
                assert generated < 10.0
                assert 30.0 < ranked < 70.0


@pytest.mark.slow
def test_your_own_method(tmp_path):
    notebook = build.set_parameters(read("your_own_method"), INSTALL=False, STEPS=100)
    text = printed(build.execute(notebook, tmp_path))
    assert text.count("tuned, best (step 6100)") == 2
    assert "Did you mean noise?" in text
    assert text.endswith("all as expected\n")
    assert not re.search(NOISE, text)


# A real T5: a small random one, and rows of our own, in place of what is downloaded.


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A Hugging Face folder of a random T5 with the vocabulary of the bundled one."""
    folder = tmp_path_factory.mktemp("backbone")
    config = ModelConfig(
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        head_dim=8,
        embed_dim=16,
        mlp_dim=32,
        num_embeddings=512,
    )
    t5x.write_t5x(str(folder / "checkpoint_0"), random_params(config), 0)
    convert(str(folder / "checkpoint_0"), str(folder / "t5"))
    vocabulary = Path(assets.tiny_vocabulary()).read_bytes()
    (folder / "t5" / "spiece.model").write_bytes(vocabulary)
    return folder / "t5"


@pytest.fixture(scope="module")
def rte(tmp_path_factory):
    """TFDS's folder of an RTE of 40 training and 16 validation rows in the words of the world."""
    folder = tmp_path_factory.mktemp("rte")
    (folder / "RTE").mkdir()
    texts = [row["inputs"] for row in generator.demo_rows("tiny_mood", "train")]
    for split, numbers in (("train", range(40)), ("val", range(40, 56))):
        with (folder / "RTE" / f"{split}.jsonl").open("w") as file:
            for number in numbers:
                label = ("entailment", "not_entailment")[number % 2]
                pair = {"premise": texts[2 * number], "hypothesis": texts[2 * number + 1]}
                file.write(json.dumps({**pair, "label": label, "idx": number}) + "\n")
    prepare_superglue(folder, folder / "data")
    return folder / "data"


@pytest.fixture
def notebook(backbone):
    has_peft = all(find_spec(name) for name in ("torch", "transformers", "peft"))
    return build.set_parameters(
        read("real_t5"),
        INSTALL=False,
        BACKBONE=str(backbone),
        VOCABULARY=str(backbone),
        PEFT_MODEL=str(backbone) if has_peft else "",
        LENGTHS={"inputs": 96, "targets": 16},
        PROMPT_LENGTH=6,
        BATCH_SIZE=8,
        STEPS=40,
        EVAL_PERIOD=10,
    )


@pytest.mark.slow
def test_a_real_t5_learns_rte_and_goes_on_after_an_interruption(notebook, rte, tmp_path):
    notebook = build.set_parameters(notebook, TFDS_DATA_DIR=str(rte))
    states = tmp_path / "runs" / "taskless_super_glue_rte_v102" / "checkpoints"
    stopped = []

    class Interrupted(NotebookClient):
        """Sends the training cell an interrupt once a state is saved, then executes it again."""

        async def async_execute_cell(self, cell, number, **how):
            if "pt.train(" in cell.source and not stopped:
                threading.Thread(target=self.interrupt, daemon=True).start()
                with contextlib.suppress(CellExecutionError):
                    await super().async_execute_cell(cell, number, **how)
                stopped.append(list(cell.outputs))
            return await super().async_execute_cell(cell, number, **how)

        def interrupt(self):
            while not list(states.glob("[0-9]*")):
                time.sleep(0.05)
            os.kill(self.km.provisioner.process.pid, signal.SIGINT)

    build.execute(notebook, tmp_path, client=Interrupted)
    ((*_, error),) = stopped
    assert error.ename == "Stopped"
    (message,) = error.traceback
    assert re.search(r"stopped by Ctrl-C. The state of step \d+ is saved", message)
    text = printed(notebook)
    assert "continuing at step" in text
    assert "MICROBATCHES = 1, inputs of 96 tokens" in text
    assert re.search(r"\d+ of 16 rows are wrong", text)
    assert not re.search(NOISE, text)
    assert pictures(notebook) == 3  # curves, confusions, the prompt
    has_peft = "PEFT_MODEL = ''" not in build.find(notebook, "parameters").source
    assert text.count(" PEFT ") == (8 if has_peft else 0)
    prompt, metadata = load_prompt(states.parent / "prompts" / "best")
    assert prompt.shape == (6, 16)
    assert metadata.task == "taskless_super_glue_rte_v102"


@pytest.mark.slow
def test_a_csv_of_your_own_by_the_parameters_alone(notebook, tmp_path):
    rows = generator.demo_rows("tiny_mood", "train")[:60]
    lines = [f'"{row["inputs"]}",{row["targets"]}\n' for row in rows]
    (tmp_path / "reviews.csv").write_text("review,mood\n" + "".join(lines))
    notebook = build.set_parameters(
        notebook,
        TRAIN_FILE="reviews.csv",
        INPUT_TEMPLATE="{review}",
        TARGET_FIELD="mood",
        LABEL_WORDS={"up": "up", "down": "down"},
        STEPS=10,
    )
    done = build.execute(notebook, tmp_path)
    assert "54 rows" in printed(done)
    assert re.search(r"\d+ of 6 rows are wrong", printed(done))
    assert (tmp_path / "runs" / "reviews" / "prompts" / "best").is_dir()

    (tmp_path / "reviews.csv").write_text("text,mood\n" + "".join(lines))
    wrong = build.set_parameters(notebook, FOLDER="others")
    with pytest.raises(CellExecutionError):
        build.execute(wrong, tmp_path)
    (error,) = [o for cell in wrong.cells for o in cell.get("outputs", []) if "ename" in o]
    (message,) = error.traceback
    assert re.fullmatch("error: .*reviews.csv.*review.*", message, flags=re.DOTALL)


@pytest.mark.slow
def test_without_a_checkpoint_the_cell_says_so_in_one_message(notebook, tmp_path):
    notebook = build.set_parameters(notebook, BACKBONE="./nowhere")
    with pytest.raises(CellExecutionError):
        build.execute(notebook, tmp_path)
    (error,) = [o for cell in notebook.cells for o in cell.get("outputs", []) if "ename" in o]
    assert error.ename == "ConfigError"
    (message,) = error.traceback
    assert message.startswith("error: ")
    assert "nowhere" in message
