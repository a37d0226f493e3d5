"""Which loads are in flight when a thread reaches a barrier, read from machine code.

Instructions are walked in the order of the code, twice, so that loads of a loop's end meet the barriers of its
beginning. Only 16-byte loads count: those of slabs, whose rows other threads may store to after the barrier.
"""

from __future__ import annotations

import re

SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/")


def in_flight_nvidia(sass: str) -> int:
    """Most wide loads in flight at a barrier. sass: of `cuobjdump --dump-sass`, sm_70 to sm_120.

    The upper word of an instruction holds the scoreboard that its result releases (bits 46 to 48) and those it waits
    for before it is issued (bits 52 to 57). Raises ValueError where no instruction is found.
    """
    code = [(text, int(word, 16)) for text, word in SASS.findall(sass)]
    if not code:
        raise ValueError("no instructions of the known form: has cuobjdump's output changed?")
    pending: list[set[int]] = [set() for _ in range(8)]
    most = 0
    for place, (text, control) in [*enumerate(code)] * 2:
        for scoreboard in range(6):
            if control >> (52 + scoreboard) & 1:
                pending[scoreboard].clear()
        if re.search(r"\bBAR\.(?:SYNC|RED|ARV)", text):
            most = max(most, len(set().union(*pending)))
        if re.search(r"\bLDG\.E\.(?:\w+\.)*128", text):
            pending[control >> 46 & 7].add(place)
    return most


def in_flight_amd(assembly: str) -> int:
    """The same from assembly for gfx9, whose memory operations are counted and complete in order."""
    queue: list[int] = []  # positions of operations; -1 for irrelevant ones
    most = 0
    for place, line in [*enumerate(assembly.splitlines())] * 2:
        code = line.split(";")[0]
        if memory := re.search(r"\b(?:global|buffer|flat|scratch)_(load|store|atomic)_(\w+)", code):
            queue.append(place if memory[1] == "load" and memory[2].startswith("dwordx4") else -1)
        elif "s_waitcnt" in code and (count := re.search(r"vmcnt\((\d+)\)", code)):
            queue = queue[max(0, len(queue) - int(count[1])) :]
        elif re.search(r"\bs_barrier\b", code):
            most = max(most, len(set(queue) - {-1}))
    return most
