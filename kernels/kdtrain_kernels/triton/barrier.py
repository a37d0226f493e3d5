"""A barrier that no thread reaches before its own loads have completed.

A row's bfloat16 are stored over logits that other threads of the program have loaded. PTX and LLVM specify that a
barrier orders those loads before the stores, but the compiled code leaves loads in flight across it, so the order
cannot be verified in the code. Here the values to be stored pass through the barrier, which then depends on every load
they were computed from, and the wait is visible in the machine code (proofs/triton_sass.py checks it).
"""

from __future__ import annotations

import triton
import triton.language as tl


def _reducing_barrier(registers: int) -> str:
    """PTX: the barrier reduces "any bit set" over the thread's registers; the result is unused."""
    ins = [f"${registers + index}" for index in range(registers)]
    lines = [".reg .pred any, answer;", ".reg .b32 bits;", f"or.b32 bits, {ins[0]}, {ins[1]};"]
    lines += [f"or.b32 bits, bits, {name};" for name in ins[2:]]
    lines += ["setp.ne.b32 any, bits, 0;", "bar.red.or.pred answer, 0, any;"]
    lines += [f"mov.b32 ${index}, {name};" for index, name in enumerate(ins)]
    return "{\n" + "\n".join(lines) + "\n}"


def _constraints(registers: int) -> str:
    return ",".join(["=r"] * registers + ["r"] * registers + ["~{memory}"])


CUDA_8 = tl.constexpr(_reducing_barrier(4))
CUDA_8_REGISTERS = tl.constexpr(_constraints(4))
CUDA_16 = tl.constexpr(_reducing_barrier(8))
CUDA_16_REGISTERS = tl.constexpr(_constraints(8))


@triton.jit
def after_all(values, BACKEND: tl.constexpr, PER_THREAD: tl.constexpr):
    """values [N], 16 bits wide, unchanged, once all threads of the program have computed theirs.

    BACKEND: cuda, hip, or empty for a plain barrier (the interpreter). PER_THREAD: elements of a thread, 8 or 16; they
    pass one barrier together.
    """
    if BACKEND == "cuda":
        tl.static_assert(PER_THREAD == 8 or PER_THREAD == 16)
        if PER_THREAD == 8:
            values = tl.inline_asm_elementwise(CUDA_8, CUDA_8_REGISTERS, [values], values.dtype, False, 8)
        else:
            values = tl.inline_asm_elementwise(CUDA_16, CUDA_16_REGISTERS, [values], values.dtype, False, 16)
    elif BACKEND == "hip":
        # LLVM waits for the operands of the assembly, which stays in front of the barrier.
        values = tl.inline_asm_elementwise("v_mov_b32 $0, $1", "=v,v,~{memory}", [values], values.dtype, False, 2)
        tl.debug_barrier()
    else:
        tl.debug_barrier()
    return values
