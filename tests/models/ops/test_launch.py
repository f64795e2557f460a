"""How kernels are launched: by which blocks, and with which values."""

import json

from support import command

KERNEL, CLASS = "routed.forward", "64 256 16 bits HEAD_DIM=32"


def launches(**environment):
    """The values that the first launch passes, and the second."""
    done = command("tests/models/ops/launch_kernels.py", TRITON_INTERPRET="0", PYTHONPATH=".:tests", **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_autotuning_adds_the_fastest_block_to_its_table_and_keeps_what_is_there(tmp_path):
    path = tmp_path / "launches.json"
    first, second = launches(DEBIFORMER_AUTOTUNE=str(path))
    assert json.loads(path.read_text()) == {KERNEL: {CLASS: [16, 16, 1, 3]}}
    assert first[-2:] == second[-2:] == [16, 16]

    table = {KERNEL: {CLASS: [32, 64, 4, 3]}}
    path.write_text(json.dumps(table))
    assert [values[-2:] for values in launches(DEBIFORMER_AUTOTUNE=str(path))] == [[32, 64]] * 2
    assert json.loads(path.read_text()) == table


def test_launch_takes_its_tables_block_and_passes_the_same_values_when_its_code_is_known(tmp_path):
    path = tmp_path / "launches.json"
    path.write_text(json.dumps({KERNEL: {CLASS: [32, 64, 4, 3]}}))
    by_triton, by_us = launches(DEBIFORMER_LAUNCHES=str(path))
    assert by_triton == by_us
    assert by_us[:1] == [[2, 56, 56, 64]]
    assert by_us[-2:] == [32, 64]
