"""What runs ahead comes in order, not too far ahead, and with its error in its place."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.prefetch import Prefetcher

ROOT = Path(__file__).parents[1]


def test_items_come_in_order_and_end():
    with Prefetcher(iter(range(100)), most=3) as items:
        assert list(items) == list(range(100))
        assert list(items) == []  # asked again, it is still at its end
    with Prefetcher(iter("abc")) as items:
        assert dict(zip(items, range(3), strict=False)) == {"a": 0, "b": 1, "c": 2}


def test_no_more_is_made_than_was_allowed():
    made, third = [], threading.Event()

    def count():
        for number in itertools.count():
            made.append(number)
            if number == 3:
                third.set()
            yield number

    with Prefetcher(count(), most=2) as items:
        assert next(items) == 0
        assert not third.wait(0.2)
        assert made == [0, 1, 2]
        assert next(items) == 1
        assert third.wait(60)
    assert len(made) <= 5


def test_an_error_is_raised_where_its_item_would_have_been():
    def numbers():
        yield 1
        raise ConfigError("row 7 is damaged")

    before = threading.active_count()
    with Prefetcher(numbers()) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(ConfigError, match="row 7"):
                next(items)
    assert threading.active_count() == before


def test_the_thread_ends_with_the_block_though_nobody_takes_its_items():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), Prefetcher(itertools.count(), most=2):
        _ = 1 / 0
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_command_starts_without_what_its_first_step_does_not_need():
    code = (
        "import sys\n"
        "from prompt_tuning.tasks.tensorflow_import import import_tensorflow\n"
        "import_tensorflow()\n"
        "import prompt_tuning.training.loop, prompt_tuning.evaluation.matrix\n"
        "found = {'torch', 'pandas', 'transformers'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
