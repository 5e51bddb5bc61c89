"""The benchmark of TRL's trainers: that both sides of its table compute the same loss."""

from __future__ import annotations

from benchmarks import trl_trainers


def test_the_table_compares_equal_losses(capsys):
    """It refuses to print one where they differ."""
    trl_trainers.main(["--hidden", "64", "--vocabulary", "500", "--rounds", "1", "--no-memory"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in lines if ": " in line[:20]}
    assert rows.keys() == set(trl_trainers.STEPS)
    assert float(rows["SDPO: TRL"][2]) == 1
