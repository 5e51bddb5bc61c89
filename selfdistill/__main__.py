"""The command `selfdistill`, which is also `python -m selfdistill`."""

from __future__ import annotations

import sys

# The modules of the extra `train`, which an installation of the kernels alone does not have.
OF_THE_TRAINER = (
    "filelock",
    "numpy",
    "peft",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
    "yaml",
)


def main() -> None:
    """Run the command line, or say what to install where the trainer's packages are missing."""
    try:
        from selfdistill.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name not in OF_THE_TRAINER:
            raise
        sys.exit(
            f"error: the trainer needs {error.name}, which is not installed: run `pip install "
            "'.[train]'` in the source folder; for the kernels alone there is `python -m "
            "selfdistill_kernels.tools.doctor`"
        )


if __name__ == "__main__":
    main()
