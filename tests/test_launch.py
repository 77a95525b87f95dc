"""Two processes with four devices each do what one with eight does, and die together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import several_processes
from test_plan import experiment
from tiny_models import CONFIG, random_params

from prompt_tuning import cli, load_prompt
from prompt_tuning.batches import batching, groups
from prompt_tuning.checkpoints.t5x import write_t5x
from prompt_tuning.config import ConfigError, to_dict
from prompt_tuning.runtime import agreement, guard, processes, startup
from prompt_tuning.session import checks
from prompt_tuning.tasks import registry, task_rows

HERE = Path(__file__).parent
STEPS = 6
TASK, LENGTHS = "short_and_long_as", {"inputs": 96, "targets": 5}
UNEQUAL = {"model": 4, "devices": (2, 6)}

# Flags and surroundings.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"process_count": 2}, "--process_count needs --multiprocess_gpu"),
        ({"multiprocess_gpu": True, "process_count": 2}, "belong together; found --process_count"),
        (
            {
                "multiprocess_gpu": True,
                "coordinator_address": "a:1",
                "process_count": 2,
                "process_index": 2,
            },
            "--process_index=2 is not in",
        ),
    ],
)
def test_flags_that_do_not_fit_say_so(flags, message):
    with pytest.raises(ConfigError, match=message):
        processes.Flags(**flags).check()


def test_slurm_and_tpu_pods_are_seen():
    nothing = processes.Flags()
    nothing.check()
    assert not processes.is_wanted(nothing, {})
    assert processes.is_wanted(processes.Flags(multiprocess_gpu=True), {})
    assert processes.is_wanted(nothing, {"SLURM_STEP_NUM_TASKS": "2"})
    assert not processes.is_wanted(nothing, {"SLURM_STEP_NUM_TASKS": "1"})
    assert processes.is_wanted(nothing, {"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not processes.is_wanted(nothing, {"TPU_WORKER_HOSTNAMES": "a"})


@pytest.mark.parametrize(
    ("tasks", "devices"),
    [("1", []), ("1(x4)", []), ("1,1(x2)", []), ("8(x4)", None), ("2,1(x3)", None), ("", None)],
)
def test_a_slurm_task_alone_on_its_node_has_all_devices(tasks, devices):
    assert processes.local_device_ids({"SLURM_STEP_TASKS_PER_NODE": tasks}) == devices
    assert processes.local_device_ids({}) is None


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("UNAVAILABLE: The coordination service is not reachable.", True),
        ("INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:5", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.", False),
        ("INVALID_ARGUMENT: Cannot concatenate arrays", False),
    ],
)
def test_only_a_lost_connection_is_a_reason_to_start_again(message, lost):
    assert guard.is_lost(jax.errors.JaxRuntimeError(message)) is lost
    assert not guard.is_lost(RuntimeError(message))


def test_one_process_agrees_with_itself():
    processes.check_joined()
    agreement.check("settings", "any")
    with agreement.raise_together("never said"):
        pass
    with pytest.raises(KeyError), agreement.raise_together("never said"):
        raise KeyError


def test_one_process_writes_where_it_was_told(tmp_path):
    with processes.writing_folder(tmp_path) as folder:
        assert folder == tmp_path


def test_compiled_programs_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = startup.choose_cache(None)
    assert chosen is not None
    assert chosen.parent == tmp_path / "prompt_tuning"
    assert chosen == startup.choose_cache(None)
    assert startup.choose_cache("off") is None
    assert startup.choose_cache(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    assert startup.choose_cache(None) is None


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp\n"
        "from prompt_tuning.runtime import startup\n"
        "startup.enable_cache(sys.argv[1])\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))\n"
        "print(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8)))[0, 0])\n"
        "print(hits.count('/jax/compilation_cache/cache_hits'))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    hits = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout.splitlines()[-1]))
    assert hits[0] == 0 < hits[1]
    assert any(p.name.endswith("-cache") for p in tmp_path.iterdir())


def test_the_guard_hands_on_the_exit_code_and_translates_an_abort(capfd, monkeypatch, tmp_path):
    assert guard.run_guarded("t5x list-tasks", ["list-taskz"]) == 2
    # As JAX's runtime ends a process that has lost the others.
    (tmp_path / "aborting.py").write_text("import os\nos.abort()\n")
    (tmp_path / "aborting.gin").write_text("import aborting\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{HERE.parent}")
    arguments = ["show-config", f"--gin_file={tmp_path / 'aborting.gin'}"]
    capfd.readouterr()
    assert guard.run_guarded("t5x train", arguments) == guard.LOST
    assert "Start all processes again with the same command" in capfd.readouterr().err
    # As the kernel ends one when memory is short.
    (tmp_path / "aborting.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    assert guard.run_guarded("t5x train", arguments) == 137
    assert "t5x train: ended by SIGKILL." in capfd.readouterr().err


def test_what_one_process_does_alone_is_refused_in_many(capsys, monkeypatch):
    with pytest.raises(ConfigError, match="TRAINABLE = 'model'"):
        checks.refuse_many_processes(experiment(CONFIG, trainable="model"))
    arguments = ["infer", "--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/infer.gin"]
    arguments += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 8}"]
    arguments += ["--input=-", "--output=-", "--multiprocess_gpu"]
    assert cli.main(arguments) == 2
    assert "`t5x infer`" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    arguments = ["submit-superglue", "--gin_file=runs/eval.gin", "--submission_dir=s"]
    assert cli.main(arguments) == 2
    assert "single process" in capsys.readouterr().err


# Whole runs.


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_t5x(folder / "checkpoint_9", random_params(), 9)
    macros = {
        **{name.upper(): value for name, value in to_dict(CONFIG).items()},
        "VOCABULARY": "bytes",
        "MIXTURE_OR_TASK_NAME": TASK,
        "MIXTURE_OR_TASK_MODULE": "user_tasks",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 16,
        "PROMPT_LENGTH": 4,
        "CLASS_LABELS": ("yes", "no"),
        "EVAL_PERIOD": 6,
        "EVAL_METHOD": "both",
        "NUM_DECODES": 2,
        "EVAL_BASELINES": False,
        "CHECKPOINT_PERIOD": 3,
        "INITIAL_CHECKPOINT_PATH": "checkpoint_9",
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in macros.items())
    (folder / "small.gin").write_text(text)
    return folder


def recipe(model_dir, *, model=4, steps=STEPS):
    return [
        "--gin_file=runs/prompt_tune.gin",
        "--gin_file=small.gin",
        f"--gin.MODEL_DIR={model_dir!r}",
        f"--gin.NUM_MODEL_PARTITIONS={model}",
        f"--gin.TRAIN_STEPS_RELATIVE={steps}",
    ]


def start(work, model_dir, *, devices=(4, 4), folders=(), **how):
    folders = folders or [work] * len(devices)
    return several_processes.start(folders, recipe(model_dir, **how), devices)


def finish(work, model_dir, *, steps=STEPS, **how):
    started = start(work, model_dir, steps=steps, **how)
    said = several_processes.finish(started)
    prompt, _ = load_prompt(work / model_dir / "prompts" / f"step_{9 + steps:06d}")
    return prompt, said


@pytest.fixture(scope="module")
def straight(work):
    """Two unequal processes, two copies of the model, of which one lies on both."""
    return finish(work, "straight", **UNEQUAL)


@pytest.fixture(scope="module")
def alone(work):
    """One process, with the same devices."""
    return finish(work, "alone", model=4, devices=(8,))


@pytest.mark.slow
def test_two_processes_are_one(work, straight, alone):
    prompt, said = straight
    np.testing.assert_allclose(prompt, alone[0], atol=1e-4 * np.abs(prompt).max())
    # One of them writes and speaks; the records stand there once.
    assert TASK in said[0]
    assert TASK not in said[1]
    lines = [(work / name / "metrics.jsonl").read_text() for name in ("straight", "alone")]
    assert len(lines[0].splitlines()) == len(lines[1].splitlines()) > 0
    answer_alike(work / "straight", work / "alone")


def test_the_batches_of_these_runs_are_cut():
    registry.import_task_module("user_tasks")
    rows = task_rows.load_rows(TASK, "train", LENGTHS)
    cutting = groups.Cutting(96, 5, most=8, data_parts=2)
    for step in range(STEPS):
        cut = batching.train_groups([rows], [1.0], cutting, seed=0, step=step, batch_size=16)
        widths = {group["encoder_input_tokens"].shape[1] for group in cut}
        assert len(cut) == 8
        assert min(widths) < 32
        assert max(widths) > 64


def answer_alike(model_dir, other):
    """Batches of 16 leave an odd last one of 4: every row is answered once, and alike."""
    found, wanted = answers(model_dir), answers(other)
    assert len(found) == len(wanted) == 20
    for mine, same in zip(found, wanted, strict=True):
        assert mine["input"] == same["input"]
        assert mine["output"] == same["output"]
        np.testing.assert_allclose(mine["score"], same["score"], atol=1e-4)
        for word, score in same["label_scores"].items():
            np.testing.assert_allclose(mine["label_scores"][word], score, atol=1e-4)


@pytest.mark.slow
def test_a_dry_run_shows_all_devices_and_the_rows_of_each_host(work):
    """Of 16 rows on 2 + 6 devices, the first host, which speaks, has four."""
    arguments = [*recipe("dry", model=1), "--dry_run"]
    said = several_processes.finish(several_processes.start([work] * 2, arguments, (2, 6)))
    assert "mesh: data 8 x model 1 on 8 cpu, 2 process(es)" in said[0]
    assert "batch: 16 rows, 2 a data-parallel device, 4 of this host" in said[0]
    assert "mesh" not in said[1]
    assert not (work / "dry").exists()


@pytest.mark.weekly
def test_a_signal_stops_all_and_the_run_goes_on(work, straight):
    """As scancel and preemption send it: to every process."""
    started = start(work, "stopped", steps=5000)
    wait_for(work / "stopped", 9 + 3, started)
    began = time.monotonic()
    for process in started:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[0] for process in started]
    taken = time.monotonic() - began
    print(f"gone after {taken:.1f} s: {[text.strip().splitlines()[-1] for text in said]}")
    assert taken < 60
    assert all(process.returncode in (143, guard.LOST) for process in started), said
    assert any(process.returncode == 143 for process in started), said
    last = max(saved(work / "stopped"))
    finish(work, "stopped", steps=last - 9 + 3)
    assert max(saved(work / "stopped")) == last + 3


@pytest.mark.weekly
def test_what_does_not_fit_together_is_refused_by_all(work, straight):
    """A damaged newest state is left aside by all; an unshared MODEL_DIR is refused by all."""
    shutil.copytree(work / "straight", work / "damaged")
    newest = max(saved(work / "damaged"))
    file = next((work / "damaged" / "checkpoints" / str(newest)).rglob("manifest.ocdbt"))
    file.write_bytes(b"no manifest")
    prompt, said = finish(work, "damaged", **UNEQUAL)
    np.testing.assert_array_equal(prompt, straight[0])
    assert f"the saved state of step {newest} is damaged" in said[0]

    (work / "elsewhere").mkdir()
    shutil.copy(work / "small.gin", work / "elsewhere")
    (work / "elsewhere" / "checkpoint_9").symlink_to(work / "checkpoint_9")
    started = start(work, "damaged", folders=(work, work / "elsewhere"))
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert all("saved states" in text for text in said)

    # A prompt that begins differently would stay different.
    for folder, value in ((work, 0.1), (work / "elsewhere", 0.2)):
        np.save(folder / "first.npy", np.full((4, CONFIG.embed_dim), value, np.float32))
    flags = [*recipe(str(work / "prompts_differ")), "--gin.PROMPT_FILE='first.npy'"]
    started = several_processes.start([work, work / "elsewhere"], flags, (4, 4))
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert all("first prompt" in text for text in said)


def answers(model_dir):
    """The rows of the last evaluation, as it wrote them."""
    file = model_dir / "inference_eval" / f"{TASK}-{9 + STEPS:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.weekly
@pytest.mark.parametrize("model", [1, 2, 4, 8])
def test_four_devices_each_on_other_meshes(work, alone, model):
    prompt, _ = finish(work, f"other_{model}", model=model)
    np.testing.assert_allclose(prompt, alone[0], atol=1e-4 * np.abs(prompt).max())
    answer_alike(work / f"other_{model}", work / "alone")


@pytest.mark.weekly
@pytest.mark.parametrize("begins", [UNEQUAL, {"model": 4, "devices": (8,)}], ids=["two", "one"])
def test_a_run_goes_on_in_another_number_of_processes(work, alone, begins):
    """Two begin and one goes on, or one and two: what is saved is the same, and so is the end."""
    ends = {"model": 4, "devices": (8,)} if begins is UNEQUAL else UNEQUAL
    name = f"begun_by_{len(begins['devices'])}"
    finish(work, name, steps=3, **begins)
    prompt, said = finish(work, name, **ends)
    assert "continuing at step 12" in said[0]
    np.testing.assert_allclose(prompt, alone[0], atol=1e-4 * np.abs(prompt).max())
    answer_alike(work / name, work / "alone")


@pytest.mark.weekly
def test_two_processes_score_as_one(work, straight):
    for name, devices in (("scored", (2, 6)), ("scored_alone", (8,))):
        arguments = [
            f"--gin_file={work / 'straight' / 'config.gin'}",
            "--gin_file=runs/eval.gin",
            "--gin.PROMPT_FILE='straight/prompts/best'",
            f"--gin.EVAL_OUTPUT_DIR={name!r}",
        ]
        several_processes.finish(
            several_processes.start([work] * len(devices), arguments, devices, "eval")
        )
    answer_alike(work / "scored", work / "straight")
    answer_alike(work / "scored", work / "scored_alone")


@pytest.mark.weekly
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_when_one_is_killed_all_end_and_a_restart_continues(work, victim):
    steps = 120
    expected, _ = finish(work, f"whole_{victim}", steps=steps)
    name = f"killed_{victim}"
    started = start(work, name, steps=steps)
    wait_for(work / name, 9 + 6, started)
    all_of_them = [pid for process in started for pid in family(process.pid)]
    assert len(all_of_them) == 4  # a guard and what it guards, twice
    started[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said, _ = started[1 - victim].communicate(timeout=120)
    assert time.monotonic() - killed < 60, said
    assert started[1 - victim].returncode == guard.LOST, said
    assert "Start all processes again with the same command" in said.strip().splitlines()[-1]
    started[victim].communicate(timeout=60)
    assert not any(map(is_running, all_of_them))
    assert time.monotonic() - killed < 60
    assert max(saved(work / name)) < 9 + steps
    again, _ = finish(work, name, steps=steps)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.weekly
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_when_one_hangs_the_others_end(work, victim):
    """As a host that is frozen: its connections stand, and only the heartbeat is missing."""
    name = f"frozen_{victim}"
    started = start(work, name, steps=5000)
    frozen, other = started[victim], started[1 - victim]
    wait_for(work / name, 9 + 3, started)
    stopped, followed = family(frozen.pid), family(other.pid)
    assert len(stopped) == len(followed) == 2  # a guard and what it guards
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        said, _ = other.communicate(timeout=120)
        taken = time.monotonic() - began
        print(f"gone after {taken:.1f} s: {said.strip().splitlines()[-1]}")
        assert taken < 60, said
        assert other.returncode == guard.LOST, said
        assert "Start all processes again with the same command" in said.strip().splitlines()[-1]
        assert not any(Path(f"/proc/{pid}").exists() for pid in followed)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        frozen.communicate(timeout=60)


def wait_for(model_dir, step, started):
    """Until a state of this step or a later one is saved."""
    deadline = time.monotonic() + 300
    while max(saved(model_dir), default=0) < step:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Not one that has ended and that nobody has asked about: a killed guard's child."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def saved(folder: Path) -> list[int]:
    return [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
