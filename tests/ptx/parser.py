"""From the text of PTX to a list of instructions.

    kernel = parse(ptx)
    kernel.name, kernel.params         # "_ctc_lattice_kernel", [("..._param_0", "u64"), ...]
    kernel.items                        # labels (str) and Instruction, in the order of the text

Only what Triton writes is understood: one entry function in a module, registers declared in nested scopes (inline
assembly opens its own), one array of dynamic shared memory. Directives for debuggers and for ptxas are passed over;
`.loc` is kept, so that a finding can name the line of Python.
"""

import bisect
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.ptx.storage import Unsupported

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)(\.[xyz])?$")
LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
# They say how to debug or how to allocate registers, not what is computed; `.reqntid` is read from the head.
PASSED_OVER = re.compile(r"\.(file|pragma|section|maxnreg|reqntid|maxntid|minnctapersm)\b")
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*")
PLACE = re.compile(r"([\w.]+):(\d+):\d+")  # in the comment behind .loc: the outermost of inlined calls comes last


class Register(NamedTuple):
    index: int


class Special(NamedTuple):
    """A register that the hardware fills, such as tid.x."""

    name: str


class Integer(NamedTuple):
    value: int


class Float(NamedTuple):
    """A literal such as 0f3F800000, as its bits."""

    bits: int
    width: int


class Symbol(NamedTuple):
    """A label, a parameter or an array of shared memory."""

    name: str


class Vector(NamedTuple):
    elements: list


class Pair(NamedTuple):
    """Two destinations, d|p."""

    elements: list


class Not(NamedTuple):
    operand: Any


class Sink(NamedTuple):
    """The destination _, for a result that nobody wants."""


class Address(NamedTuple):
    base: Any
    offset: int


@dataclass(eq=False)
class Instruction:
    """One instruction, e.g. `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];`."""

    text: str
    line: int  # of the PTX, from 1
    guard: Register | None = None  # the predicate of @%p
    negated: bool = False  # @!%p
    opcode: str = ""  # "ld"
    modifiers: list[str] = field(default_factory=list)  # ["global", "v2", "b32"]
    operands: list = field(default_factory=list)
    source: str = ""  # "norm.py:81", of the line of Python, where the PTX says it

    def __str__(self) -> str:
        return f"line {self.line}{f' of {self.source}' if self.source else ''}: {self.text}"


def split(text: str) -> list[str]:
    """`text` at the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return parts + [current.strip()] if current.strip() else parts


class Kernel:
    """One entry function: its parameters, its registers and its instructions.

    `registers` gives the type by which each register was declared. The same name in two scopes is two registers.
    """

    def __init__(self, ptx: str):
        self.text = ptx
        text = re.sub(r"(\.loc[^\n]*)//", r"\1 ", ptx)  # the comment there says where an inlined function was called
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
        self.target = int(re.search(r"\.target\s+sm_(\d+)", text)[1])
        # All of shared memory is one array from byte 0, whose size the launch gives.
        self.shared = re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\s*\[", text)
        if len(self.shared) > 1:
            raise Unsupported(f"several arrays of shared memory: {self.shared}")
        entries = list(re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S))
        if called := re.findall(r"\.func\b\s*(?:\([^)]*\)\s*)?([\w$]+)", text):
            raise Unsupported(f"calls of functions ({', '.join(called)}), as of tl.device_print and tl.device_assert")
        if len(entries) != 1:
            raise Unsupported(f"{len(entries)} entry functions; wanted one")
        (entry,) = entries
        self.name = entry[1]
        self.params = []
        for declaration in split(entry[2]):
            found = re.match(r"\.param\s+\.([bsuf]\d+)\b.*?(\w+)$", declaration)
            if not found:
                raise Unsupported(f"parameter {declaration}")
            self.params.append((found[2], found[1]))
        threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
        self.threads = int(threads[1]) if threads else None
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text))
        depth, end = 1, entry.end()
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        self.registers: dict[int, str] = {}
        self.items: list[str | Instruction] = []
        self._body(text, entry.end(), end - 1)

    def _body(self, text: str, at: int, end: int) -> None:
        lines = [newline.start() for newline in re.finditer("\n", text)]
        scopes, source = [{}], ""
        while True:
            while at < end and text[at].isspace():
                at += 1
            if at >= end:
                return
            if text[at] == "{":
                scopes.append({})
                at += 1
            elif text[at] == "}":
                scopes.pop()
                at += 1
            elif label := LABEL.match(text, at):
                self.items.append(label[1])
                at = label.end()
            elif location := LOCATION.match(text, at):
                places = PLACE.findall(location[0]) or [(self.files.get(location[1], "?"), location[2])]
                source = ":".join(places[-1])
                at = location.end()
            elif PASSED_OVER.match(text, at):
                at = text.index("\n", at)
            else:
                line, stop = bisect.bisect_left(lines, at) + 1, text.index(";", at)
                self._statement(" ".join(text[at:stop].split()), line, source, scopes)
                at = stop + 1

    def _statement(self, text: str, line: int, source: str, scopes: list[dict[str, int]]) -> None:
        if text.startswith(".reg"):
            self._declare(text, scopes[-1])
        elif text.startswith("."):
            raise Unsupported(f"line {line}: {text}")
        elif text:
            self.items.append(self._instruction(text, line, source, scopes))

    def _declare(self, text: str, scope: dict[str, int]) -> None:
        """`.reg .b32 %r<5>` or `.reg .pred p, q`."""
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text).groups()
        for name in split(names):
            counted = re.match(r"(%?[\w$]+)<(\d+)>$", name)
            for one in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
                scope[one] = len(self.registers)
                self.registers[len(self.registers)] = kind

    def _instruction(self, text: str, line: int, source: str, scopes: list[dict[str, int]]) -> Instruction:
        instruction = Instruction(text, line, source=source)
        rest = text
        try:
            if rest.startswith("@"):
                guard, rest = rest.split(None, 1)
                instruction.negated = guard.startswith("@!")
                instruction.guard = self._operand(guard.lstrip("@!"), scopes)
            name, _, rest = rest.partition(" ")
            instruction.opcode, *instruction.modifiers = name.split(".")
            instruction.operands = [self._operand(part, scopes) for part in split(rest)]
        except Unsupported as error:
            raise Unsupported(f"{instruction}: {str(error).removeprefix('unsupported: ')}") from None
        return instruction

    def _operand(self, text: str, scopes: list[dict[str, int]]) -> Any:
        text = text.strip()
        if text.startswith("{"):
            return Vector([self._operand(part, scopes) for part in split(text[1:-1])])
        if text.startswith("["):
            found = re.match(r"\[\s*([%$\w.]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]$", text)
            if not found:
                raise Unsupported(f"address {text}")
            offset = int(found[3], 0) * (-1 if found[2] == "-" else 1) if found[3] else 0
            return Address(self._operand(found[1], scopes), offset)
        if "|" in text:
            return Pair([self._operand(part, scopes) for part in text.split("|")])
        if text.startswith("!"):
            return Not(self._operand(text[1:], scopes))
        if text == "_":
            return Sink()
        for scope in reversed(scopes):
            if text in scope:
                return Register(scope[text])
        return self._literal(text)

    @staticmethod
    def _literal(text: str) -> Any:
        if SPECIAL.match(text):
            return Special(text[1:])
        if found := re.match(r"0[fF]([0-9a-fA-F]{8})$", text):
            return Float(int(found[1], 16), 32)
        if found := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
            return Float(int(found[1], 16), 64)
        if re.match(r"-?\d+\.\d+$", text):
            return Float(int.from_bytes(struct.pack("<d", float(text)), "little"), 64)
        if found := re.match(r"(-?)(?:(0[xX][0-9a-fA-F]+)|0([0-7]+)|(\d+))U?$", text):
            value = int(found[2], 16) if found[2] else int(found[3], 8) if found[3] else int(found[4])
            return Integer(-value if found[1] else value)
        if not re.match(r"[$A-Za-z_][$\w]*$", text):
            raise Unsupported(f"operand {text}")
        return Symbol(text)

    def instructions(self) -> list[Instruction]:
        return [item for item in self.items if isinstance(item, Instruction)]

    def opcodes(self) -> Counter:
        """How often each opcode stands in the text, with its modifiers."""
        return Counter(".".join([x.opcode, *x.modifiers]) for x in self.instructions())
