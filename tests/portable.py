"""The tests that compare numbers, under lower instruction sets too: `make test-portable`.

Environment variables make torch, its libraries and our row kernels use fewer instructions than the
processor has. Each set runs in processes of its own, after a line that says what every library
really used and which variables changed nothing here (MKL, for one, obeys some of them on Intel's
processors only). The status is 0 when every set passed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class InstructionSet:
    """What the libraries are told.

    Attributes:
        name: of the set.
        rows: the row kernels' name for it; None leaves the choice to them.
        others: the libraries' variables beside it.
        threads: of each process.
    """

    name: str
    rows: str | None
    others: Mapping[str, str]
    threads: int = 1

    @property
    def variables(self) -> dict[str, str]:
        rows = {} if self.rows is None else {"SELFDISTILL_CPU_CAPABILITY": self.rows}
        return {**rows, **self.others}


SETS = (
    # `make test` has run these with one thread.
    InstructionSet("own", None, {}, threads=2),
    InstructionSet(
        "AVX2",
        "avx2",
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
    ),
    InstructionSet(
        "plain",
        "default",
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "MKL_CBWR": "COMPATIBLE",
        },
    ),
)
ORDER = ("default", "avx2", "avx512")  # of the row kernels' instructions

# All that depends on how numbers are rounded, or on which product is taken. The rest (choices,
# messages, files, planning of whole runs) has nothing that instructions could change.
TESTS = (
    *(
        f"tests/selfdistill_kernels/{name}.py"
        for name in (
            "backends/native/test_kept", "backends/native/test_plan", "backends/native/test_rows",
            "backends/native/test_workspace", "test_fuzz", "test_in_place", "test_loss", "test_ops",
            "test_oracles", "test_tolerance", "test_tolerance_one_sweep", "test_top_k",
        )
    ),
    *(
        f"tests/selfdistill/{name}"
        for name in (
            "analysis/test_tokens.py", "methods", "model/attention/test_backends.py",
            "model/attention/test_tree.py", "model/test_scoring.py", "model/test_sharding.py",
            "model/test_teacher.py", "model/test_weights.py", "rollout",
            "training/test_agreement.py", "training/test_gradients.py",
        )
    ),
    "tests/benchmarks/test_peers.py",
)  # fmt: skip
# Their ranks have one thread each, whatever a set says, and `make test` has run them so.
ONE_THREAD = "tests/selfdistill/model/test_sharding.py"
# Inductor compiles for the processor that it finds, 20 s a test.
SELECTION = ("-m", "not slow", "-k", "not inductor and not compiled_equals_the_truth")
PROCESSORS = 2


def probe() -> None:
    """Print what this process's libraries use, and a digest of what they compute, as JSON.

    MKL and oneDNN tell of themselves on the standard output, in lines before it.
    """
    import torch

    from selfdistill_kernels.backends.registry import native_problem

    if (problem := native_problem()) is not None:  # it loads the row kernels
        raise RuntimeError(problem)

    def numbers(*shape: int, seed: int) -> torch.Tensor:
        """The same on every instruction set, which torch.randn's are not."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-(2**20), 2**20, shape, generator=generator) / 2.0**18

    a, b = numbers(64, 576, seed=0), numbers(576, 300, seed=1)
    states = numbers(1, 4, 33, 16, seed=2)
    made = [
        a @ b, a[:1] @ b, a @ b[:, 0], a.double() @ b.double(), a.bfloat16() @ b.bfloat16(),
        torch.conv2d(states, states), torch.log_softmax(b, 0),
        torch.nn.functional.scaled_dot_product_attention(states, states, states),
    ]  # fmt: skip
    rows = torch.ops.selfdistill
    bits = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in made)
    sys.stdout.flush()
    found = {
        "aten": torch.backends.cpu.get_cpu_capability(),
        "rows": rows.cpu_capability(),
        "bfloat16": rows.gemm_bf16_available(),
        "bits": hashlib.sha256(bits).hexdigest(),
    }
    print("\n" + json.dumps(found))


def found_under(variables: Mapping[str, str]) -> dict[str, str]:
    """What `probe` says in a process with these variables, and what MKL and oneDNN say there."""
    output = python("tests/portable.py", "probe", MKL_VERBOSE="1", ONEDNN_VERBOSE="1", **variables)
    found: dict[str, str] = json.loads(output.splitlines()[-1])
    said = {
        "mkl": r"^MKL_VERBOSE .* for .* architecture (.*?) processors",
        "cnr": r" CNR:(\w+)",
        "onednn": r"^onednn_verbose.*,cpu,isa:(.*)$",
    }
    for name, pattern in said.items():
        match = re.search(pattern, output, re.MULTILINE)
        found[name] = match[1].strip() if match else "silent"
    return found


def python(*arguments: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise RuntimeError(f"{variables}: {run.stderr}")
    return run.stdout


def describe(found: Mapping[str, str]) -> str:
    products = "of bfloat16" if found["bfloat16"] else "widened to float32"
    mkl = found["mkl"] if found["cnr"] in ("OFF", "silent") else f"CNR {found['cnr']}"
    return (
        f"ATen {found['aten']}, row kernels {found['rows']}, 16-bit products {products}, "
        f"oneDNN {found['onednn']}, MKL {mkl}"
    )


def without_effect(chosen: InstructionSet, own: Mapping[str, str]) -> list[str]:
    """Which of the set's variables, each alone, change neither a fact nor a bit."""
    facts = ("aten", "rows", "bfloat16", "onednn", "bits")
    without = []
    for name, value in chosen.variables.items():
        found = found_under({name: value})
        if all(found[fact] == own[fact] for fact in facts):
            without.append(f"{name}={value}")
    return without


def main() -> int:
    """Run every set; return 1 when one of them failed."""
    own = found_under({})
    failed = []
    for chosen in SETS:
        if chosen.rows is not None and ORDER.index(chosen.rows) > ORDER.index(own["rows"]):
            print(f"\n{chosen.name}: not run, this processor has no {chosen.name}", flush=True)
            continue
        found = found_under(chosen.variables)
        print(f"\n{chosen.name}: {describe(found)}")
        if chosen.variables and found == own:
            print(f"{chosen.name}: not run, the same as own here", flush=True)
            continue
        for variable in without_effect(chosen, own):
            print(f"{chosen.name}: {variable} has no effect here")
        sys.stdout.flush()
        start = time.monotonic()
        status = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "--durations=5",
                "-n", str(PROCESSORS // chosen.threads), "--dist", "loadfile", *SELECTION,
                *(test for test in TESTS if chosen.threads == 1 or test != ONE_THREAD),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(chosen.threads), **chosen.variables},
            check=False,
        ).returncode  # fmt: skip
        verdict = "passed" if status == 0 else f"FAILED, status {status},"
        print(f"{chosen.name}: {verdict} in {time.monotonic() - start:.0f} s", flush=True)
        if status:
            failed.append(chosen.name)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nEvery instruction set passed.")
    return bool(failed)


if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        probe()
    else:
        sys.exit(main())
