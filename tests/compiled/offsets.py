"""Finds offsets that overflow int32: products of two runtime values in 32 bits that become part of an address.

It reads Triton's intermediate form (TTIR), in which functions are inlined. A product with a constant is let through,
and one of a place within a tile, because a tile has at most a few hundred rows.
"""

import re

LINE = re.compile(r"\s*(%[\w.]+)(?::\d+)? = \"?([\w.]+)\"?\s*(.*)")
VALUE = re.compile(r"%[\w.]+")
# Through these an offset passes as it is, or as a part of a larger one.
CARRIES = {
    "arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.select", "arith.minsi", "arith.maxsi", "tt.splat",
    "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "ttg.convert_layout",
}  # fmt: skip
SAME_FOR_CONSTANTS = {"tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"}


def narrow_products(ttir: str) -> list[str]:
    """The lines of `ttir` with such products."""
    constants, products, users = set(), {}, {}
    for line in ttir.splitlines():
        found = LINE.match(line)
        if not found:
            continue
        name, operation, rest = found.groups()
        operands = VALUE.findall(rest.split(" loc(")[0])
        passes_on = operation in SAME_FOR_CONSTANTS and set(operands) <= constants
        if passes_on or operation in ("arith.constant", "tt.make_range"):
            constants.add(name)
        for place, operand in enumerate(operands):
            users.setdefault(operand, []).append((name, operation, place))
        narrow = re.search(r": (tensor<[\dx]*xi32>|i32\b)", rest)
        if operation == "arith.muli" and narrow and not constants & set(operands):
            products[name] = line.strip()

    def reaches_an_address(name: str, seen: set[str]) -> bool:
        if name in seen:
            return False
        seen.add(name)
        return any(
            (operation == "tt.addptr" and place == 1) or (operation in CARRIES and reaches_an_address(user, seen))
            for user, operation, place in users.get(name, [])
        )

    return [line for name, line in products.items() if reaches_an_address(name, set())]
