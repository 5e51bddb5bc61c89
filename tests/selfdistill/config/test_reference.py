from __future__ import annotations

from pathlib import Path

from selfdistill.config.reference import reference

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def test_the_page_is_that_of_the_source() -> None:
    made = "run python -m selfdistill.config.reference > docs/configuration.md"
    assert PAGE.read_text() == reference(), made


def test_a_setting_has_its_values_its_default_and_its_words() -> None:
    page = reference()
    for row in (
        "| `learning_rate` | number, > 0 | `0.0001` | The rate after warm-up. |",
        "| `top_p` | number, > 0, at most 1 | `1.0` |",
        "| `model` | text |  | The solver: a folder or a Hub name.",
        "| `every` | whole number, > 0 | `15` |",
    ):
        assert row in page, row
    assert "## `method`, `name: grpo`\n\nGRPO: no teacher" in page
    assert "## `method.loss.objective`" in page or "## `method.loss.objective`, " in page
