"""Compiles the kernel for GPUs that are not here; prints registers and bytes of spilled memory as JSON.

Started by `test_gae_triton.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlef_kernels._gae_triton import BLOCK, _gae_kernel


def usage_of(value: str, capability: int) -> dict[str, int | str]:
    """Compile for a type of values and a GPU of some capability; ask the disassembler of triton's wheel."""
    total = "*fp64" if value == "fp64" else "*fp32"
    pointers = {
        "values_ptr": f"*{value}",
        "rewards_ptr": "*fp32",
        "action_mask_ptr": "*u8",
        "cu_seqlens_ptr": "*i32",
        "advantages_ptr": total,
        "returns_ptr": total,
    }
    constants = {"GAMMA": 0.99, "LAMBDA": 0.95, "BLOCK": BLOCK}
    source = ASTSource(
        fn=_gae_kernel,
        signature={**pointers, "tokens": "i32", **dict.fromkeys(constants, "constexpr")},
        constexprs={(_gae_kernel.arg_names.index(name),): number for name, number in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in range(len(pointers))},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {"value": value, "capability": capability, "threads": 32 * compiled.metadata.num_warps, **found}


if __name__ == "__main__":
    usages = [
        usage_of(value, capability) for value in ("bf16", "fp32", "fp64") for capability in (80, 90, 100)
    ]
    sys.stdout.write(json.dumps(usages) + "\n")
