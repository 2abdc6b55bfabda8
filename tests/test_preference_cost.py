"""The measurement of what preference costs: each row in a process of its own, real and dry."""

import pytest

from posttrain.studies.preference_cost import main


def test_rows_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A transformer of one head and one block; in turn is 10/3 of the work, and 6 of what stays forward."""
    size = ["--heads", "1", "--blocks", "1", "--geometry", "5x32x32"]
    assert main([*size, "--steps", "2", "--device", "cpu", "--rows", "in_turn"]) == 0
    out = capsys.readouterr().out
    title, _, *_, clips, turn = out.splitlines()
    assert title.endswith("2 x 8 tokens, cpu")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (clips, turn)]
    assert [row[0] for row in rows] == ["LoRA, true clips", "LoRA-SR, pair in turn"]
    assert [rows[0][i] for i in (2, 5, 6)] == ["1.00", "1.00", "1.00"]
    assert 10 / 3 < float(rows[1][6]) < 6
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
