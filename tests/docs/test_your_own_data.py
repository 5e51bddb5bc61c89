"""docs/your-own-data.md, followed from its table to the loaded adapter with a tiny model."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from page_blocks import ROOT, blocks
from tiny_runs import lines
from tiny_solvers import tiny_llama
from tiny_tokenizers import byte_level
from typer.testing import CliRunner

from selfdistill.cli import app

PAGE = ROOT / "docs" / "your-own-data.md"
TABLE = ROOT / "examples" / "own_data" / "tickets.csv"


@pytest.mark.slow  # two runs as long as the page has them
def test_a_reader_gets_from_the_table_to_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level()
    tiny_llama(tokenizer, positions=1024).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    shutil.copy(TABLE, tmp_path)
    namespace: dict[str, object] = {}
    said: dict[str, str] = {}
    for block in blocks(PAGE):
        if block.language == "text":
            assert TABLE.read_text().startswith(block.text)
        elif block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(PAGE), "exec"), namespace)
        elif block.language == "sh":
            for line in block.text.splitlines():
                program, *words = shlex.split(line)
                assert program == "selfdistill"
                ended = CliRunner().invoke(app, words)
                assert ended.exit_code == 0, f"{line}\n{ended.output}\n{ended.exception!r}"
                said[line] = " ".join(ended.output.split())

    # What the page promises.
    assert "40 rows with ['message', 'team', 'reason']" in capsys.readouterr().out
    dry = said["selfdistill train tickets.yaml --dry-run"]
    for promise in ("Problems: train 24, dev 8, test 8.", "Of 24 solutions", "finds 24 right"):
        assert promise in dry
        assert promise in PAGE.read_text()
    assert "the teacher's reference:" in said["selfdistill show runs/tickets --rollouts 2"]
    run = tmp_path / "runs" / "tickets"
    for name in ("report/compare.html", "completions/step-000012.jsonl", "checkpoints/last"):
        assert (run / name).exists()
    assert [line["step"] for line in lines(run, "evaluations.jsonl")] == [0, 6, 12]
    rewards = [line["reward"] for line in lines(tmp_path / "runs" / "reward", "metrics.jsonl")]
    assert all(-0.1 <= reward < 0 for reward in rewards)  # of a model that names no team
    # Both that were loaded are the trained one.
    model, adapted = namespace["model"], namespace["adapted"]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        merged, apart = (m(ids).logits for m in (model, adapted))  # type: ignore[operator]
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
