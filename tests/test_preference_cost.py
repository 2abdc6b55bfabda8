"""The measurement of what preference costs: each row in a process of its own, real and dry."""

import json
from functools import partial

import pytest

from posttrain.commands.dry import dry_step
from posttrain.models.wan.shapes import of_configs
from posttrain.studies.preference_cost import GROUPS, ROWS, main, shape_of, table


@pytest.mark.slow
def test_rows_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A transformer of one head and one block; in turn is 10/3 of the work, and 6 of what stays forward."""
    words = ["--heads", "1", "--blocks", "1", "--geometry", "5x32x32", "--steps", "2", "--device", "cpu"]
    assert main([*words, "--rows", "psft"]) == 0  # which measures in a process of its own
    title, *_, clips = capsys.readouterr().out.splitlines()
    assert title.endswith("2 x 8 tokens, cpu")
    assert main([*words, "--alone", "in_turn"]) == 0
    measured = dict.fromkeys(("psft", "in_turn"), tuple(json.loads(capsys.readouterr().out.splitlines()[-1])))
    estimates = {
        name: dry_step(partial(of_configs, ROWS[name].model, shape_of(1, 1), {}), 5, 32, 32, ROWS[name].method, GROUPS)
        for name in measured
    }
    *_, turn = table(measured, estimates).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (clips, turn)]
    assert [row[0] for row in rows] == ["LoRA, true clips", "LoRA-SR, pair in turn"]
    assert [rows[0][i] for i in (2, 5, 6)] == ["1.00", "1.00", "1.00"]
    assert 10 / 3 < float(rows[1][6]) < 6
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
