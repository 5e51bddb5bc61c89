"""What a model folder holds: configuration, tokenizer, weights, or one line about what is wrong.

Everything that is loaded by name goes through here. Code that comes with a model is never run, and
weights that pickle could hide code in are not read. A model that could be loaded only in part (a
file that lacks tensors, a quantised or a vision-language model) is refused by name: transformers
would fill it up with random numbers, or train something else than what was meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from selfdistill.errors import UserError
from selfdistill.json_text import parse_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_OTHER_SENSES = ("vision", "audio", "image", "video", "speech", "vq_")
_LFS = b"version https://git-lfs"


class UnusableModelError(UserError):
    """A model that cannot be loaded whole; the message names setting and file, and what to do."""


def load_config(name: str, *, setting: str = "model") -> PreTrainedConfig:
    """Load a model's configuration.

    Args:
        name: a folder or a Hub name.
        setting: where the name was written, for messages.

    Raises:
        UnusableModelError: there is none, it cannot be read, or it is of a model that this program
            cannot train: of another kind, quantised, or one that sees or hears.
    """
    if Path(name).is_dir():
        _check_configuration_file(Path(name), setting)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever the file makes transformers raise
        raise _not_loaded(name, "configuration", error, setting) from error
    kind = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        method = _quantization_method(config.quantization_config)
        raise UnusableModelError(
            f"{setting}: {name} is quantised (quantization_config in its config.json: {method}), "
            "expected plain weights: use the model that it was made of"
        )
    other = sorted(
        part
        for part, value in vars(config).items()
        if isinstance(value, PreTrainedConfig) and any(word in part for word in _OTHER_SENSES)
    )
    if other:
        raise UnusableModelError(
            f"{setting}: {name} is a {kind} model with {', '.join(other)} in its config.json, "
            "expected a language model alone: save its language model as a folder of its own, or "
            "use a text-only model"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnusableModelError(
            f"{setting}: {name} is a {kind} model, expected one that transformers "
            f"{transformers.__version__} loads as a causal language model"
        )
    return config


def load_tokenizer(
    name: str, *, chat_template: Path | None = None, setting: str = "model"
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        name: a folder or a Hub name.
        chat_template: a file with the Jinja template to use instead of the tokenizer's own.
        setting: where the name was written, for messages.

    Raises:
        UnusableModelError: there is none, or it or the template cannot be read; see `load_config`,
            too.
    """
    load_config(name, setting=setting)  # which the tokenizer's class depends on
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain ones
        raise _not_loaded(name, "tokenizer", error, setting) from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UnusableModelError(
                f"{setting}: cannot read the chat template {chat_template} ({error}), expected "
                "UTF-8 text: set chat_template beside it to a file with one"
            ) from error
    return tokenizer


def load_causal_lm(name: str, *, dtype: torch.dtype, setting: str = "model") -> PreTrainedModel:
    """Load a model with all its weights, in eval mode on the CPU.

    Raises:
        UnusableModelError: see `load_config`; or the weights are missing, torn, pickled, of another
            model, fewer than the model has, or not numbers.
    """
    # Files first, because a message about a file says more than what transformers makes of it.
    load_config(name, setting=setting)
    _check_generation_file(name, setting)
    if Path(name).is_dir():
        for path in _weight_files(Path(name), setting):
            _check_weight_file(path, setting)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported instead, and refused below
        )
    except Exception as error:  # whatever the files make transformers raise
        raise _not_loaded(name, "weights", error, setting) from error
    # transformers fills up what is missing or does not fit with random numbers.
    wrong = [
        f"{key} is {list(found)} instead of {list(wanted)}"
        for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    if wrong:
        raise UnusableModelError(
            f"{setting}: {name}: its weights are of another model than its config.json says: "
            f"{_some(wrong)}. Copy both from one place"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnusableModelError(
            f"{setting}: {name}: its weight files lack {len(missing)} of the model's tensors: "
            f"{_some(missing)}. They would start from random numbers: copy the folder again, or "
            "mend its config.json"
        )
    broken = sorted(
        name for name, tensor in model.state_dict().items() if bool(tensor.isnan().any())
    )
    if broken:
        raise UnusableModelError(
            f"{setting}: {name}: NaN in {_some(broken)}, expected numbers: copy it again, or "
            "go back to an earlier checkpoint"
        )
    return model.eval()


def load_generation_config(name: str, config: PreTrainedConfig) -> GenerationConfig:
    """Read a generation config; a model without one has what its own config says.

    Raises:
        UnusableModelError: there is one, and it cannot be read.
    """
    _check_generation_file(name, "model")
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(config)


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, largest: int, *, rows: int, setting: str = "model"
) -> None:
    """Refuse a tokenizer that can put a token into a prompt that the embedding has no row for.

    Args:
        tokenizer: of the model.
        largest: the largest token id that a prompt may have.
        rows: of the embedding.

    Raises:
        UnusableModelError: there is such a token.
    """
    largest = max(largest, tokenizer.eos_token_id or 0)
    if largest >= rows:
        raise UnusableModelError(
            f"{setting}: {tokenizer.name_or_path}: its tokenizer has token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but its embedding {rows} rows, "
            "expected more rows than that: copy model and tokenizer from one place, or resize the "
            "embedding (resize_token_embeddings) and save the model"
        )


def _check_configuration_file(folder: Path, setting: str) -> None:
    adapter, path = folder / "adapter_config.json", folder / "config.json"
    if adapter.exists():
        base = _read_json(adapter, setting).get("base_model_name_or_path")
        raise UnusableModelError(
            f"{setting}: {folder} holds an adapter of {base!r} (adapter_config.json), expected a "
            "whole model: merge it into its model (peft's merge_and_unload) and save that"
        )
    if not path.exists():
        raise _incomplete(folder, "config.json", setting)
    data = _read_json(path, setting)
    if not isinstance(data.get("model_type"), str):
        raise UnusableModelError(
            f"{setting}: {path} has no model_type, expected the family that transformers knows it "
            "by, such as llama: is it the configuration of a model?"
        )
    known = data["model_type"] in transformers.CONFIG_MAPPING
    if not known and "auto_map" in data:
        raise UnusableModelError(
            f"{setting}: {path} asks to run code that comes with the model (auto_map, model_type "
            f"{data['model_type']!r}), which this program never does: use a family that "
            f"transformers {transformers.__version__} has"
        )
    if not known:
        raise UnusableModelError(
            f"{setting}: {path} has model_type {data['model_type']!r}, which transformers "
            f"{transformers.__version__} does not know: use another model, or update transformers"
        )


def _check_generation_file(name: str, setting: str) -> None:
    """Refuse a torn file, which transformers would ignore: its tokens would then end no answer."""
    path = Path(name) / "generation_config.json"
    if path.exists():
        _read_json(path, setting)


def _weight_files(folder: Path, setting: str) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        weight_map = _read_json(folder / INDEX, setting).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UnusableModelError(
                f"{setting}: {folder / INDEX} has no weight_map: copy the folder again"
            )
        shards = [folder / shard for shard in sorted({*map(str, weight_map.values())})]
        for shard in shards:
            if not shard.exists():
                raise _incomplete(folder, f"{shard.name} (named in {INDEX})", setting)
        return shards
    raise _other_weights(folder, str(folder), setting) or _incomplete(folder, WEIGHTS, setting)


def _other_weights(folder: Path, name: str, setting: str) -> UnusableModelError | None:
    """Return the refusal of a model whose weights are in files of another kind; None: in none."""
    others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    if not others:
        return None
    return UnusableModelError(
        f"{setting}: {name} has its weights in {_some(others)}, expected {WEIGHTS}: pickled files "
        "can run code and are not read, others lack what is trained. Load it once with "
        "transformers where you trust it, and save it with save_pretrained"
    )


def _check_weight_file(path: Path, setting: str) -> None:
    """Read the header, which says how long the file must be."""
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
        size = path.stat().st_size
        reason = (
            "is a Git LFS pointer, expected the weights: run git lfs pull in its folder"
            if pointer
            else f"({size:,} bytes) is torn or no safetensors file ({error}): copy it again"
        )
        raise UnusableModelError(f"{setting}: {path} {reason}") from error


def _check_tokenizer_file(path: Path, setting: str) -> None:
    if path.suffix == ".json":
        _read_json(path, setting)
        return
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnusableModelError(
            f"{setting}: {path} is no UTF-8 text ({error}): copy it again, or save it as UTF-8 (if "
            "it is Latin-1: iconv -f ISO-8859-1 -t UTF-8)"
        ) from error


def _read_json(path: Path, setting: str) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise UnusableModelError(
            f"{setting}: {path} is not valid JSON ({error}): copy it again"
        ) from error
    if not isinstance(data, dict):
        raise UnusableModelError(
            f"{setting}: {path} holds a {type(data).__name__}, expected a JSON object"
        )
    return data


def _incomplete(folder: Path, missing: str, setting: str) -> UnusableModelError:
    files = _some(sorted(path.name for path in folder.iterdir())) or "nothing"
    return UnusableModelError(
        f"{setting}: the folder {folder} holds no whole model, {missing} is missing (config.json "
        f"and a tokenizer are needed for a dry run, {WEIGHTS} for training); it holds {files}"
    )


def _not_loaded(name: str, what: str, error: Exception, setting: str) -> UnusableModelError:
    """Say in one line why transformers could not load a part of a model."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    folder = Path(name)
    if folder.is_dir():
        if what == "tokenizer":
            for file in ("tokenizer.json", "tokenizer_config.json"):
                if not (folder / file).exists():
                    return _incomplete(folder, file, setting)
            for path in sorted(path for path in folder.iterdir() if path.name in _TOKENIZER_FILES):
                _check_tokenizer_file(path, setting)
        return UnusableModelError(f"{setting}: the {what} of {name} cannot be loaded: {reason}")
    # The configuration was loaded before the weights, so it is in the cache, beside other files.
    configuration = _cached_configuration(name) if what == "weights" else None
    if configuration is not None:
        refusal = _other_weights(configuration.parent, repr(name), setting)
        if refusal is not None:
            return refusal
    return UnusableModelError(
        f"{setting}: {name!r} is no local folder, and neither the cache nor the Hub gave its "
        f"{what}. Where there is a network, run hf download {name} --local-dir FOLDER "
        "(for a dry run alone add --include '*.json' '*.txt' '*.jinja'), copy FOLDER here and set "
        f"{setting}: FOLDER. transformers said: {reason}"
    )


def _cached_configuration(name: str) -> Path | None:
    """Where the Hub's config.json of a model lies in the cache, or None where it does not."""
    try:
        return Path(cached_file(name, "config.json", local_files_only=True))
    except OSError:
        return None


def _quantization_method(config: Any) -> str:
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    return str(get("quant_method") or "of an unknown method")


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
