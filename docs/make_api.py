"""Write docs/api.md from the docstrings: `python docs/make_api.py`.

griffe reads the sources without importing them. What is public, and in which order, is what the modules themselves
say: their `__all__`, else the names without an underscore that they define.
"""

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
COMMAND = "python docs/make_api.py"
# Modules in the order of the page, and what each is for.
MODULES = {
    "soundwave": "use a trained model",
    "soundwave.fused": "the fused losses and adapters as modules",
    "soundwave.fused.functional": "the fused operations as functions",
    "soundwave.eager": "the same operations and adapters in plain PyTorch",
    "soundwave.inference.answer": "load, read and ask a model, step by step",
    "soundwave.inference.long": "recordings of any length",
    "soundwave.evaluation.run": "let a model answer, and score it",
    "soundwave.evaluation.scores": "word error rate and accuracy",
    "soundwave.training.settings": "settings of the three stages",
    "soundwave.training.stages": "run a stage",
    "soundwave.data.manifest": "manifests",
    "soundwave.data.audio": "audio files",
}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
WIDTH = 100  # characters of a signature on one line


def main() -> None:
    argparse.ArgumentParser(description="Write docs/api.md from the docstrings.").parse_args()
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    package = griffe.load("soundwave", search_paths=[ROOT], allow_inspection=False)
    lines = [
        "# API",
        f"`{COMMAND}` writes this page from the docstrings: change those, not the page.\n"
        "[fused.md](fused.md) explains the fused operations with examples.",
        "\n".join(f"- [`{name}`](#{anchor(name)}): {what}" for name, what in MODULES.items()),
    ]
    seen = {name: name for name in MODULES}  # path of an object: the name under which the page documents it
    for name in MODULES:
        module = package[name.partition(".")[2]] if "." in name else package
        lines += [f"## `{name}`", *text_of(module)]
        members = public(module)
        above = [f"- `{x.name}`: {link(seen[path_of(x)])}" for x in members if path_of(x) in seen]
        lines += ["\n".join(above)] if above else []
        for member in members:
            if path_of(member) not in seen:
                lines += documented(member, f"{name}.{member.name}")
                seen[path_of(member)] = f"{name}.{member.name}"
    return "\n\n".join(lines) + "\n"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading as the target of links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def link(name: str) -> str:
    return f"[`{name}`](#{anchor(name)})"


def public(module: griffe.Module) -> list[griffe.Object | griffe.Alias]:
    """The public functions, classes and documented modules of a module, in its own order."""
    if module.exports is not None:
        members = [module.members[str(name)] for name in module.exports if str(name) in module.members]
    else:  # a package takes its names from its modules, another module defines them
        members = [
            x for x in module.members.values() if not x.name.startswith("_") and x.is_alias == module.is_init_module
        ]
    kinds = {member.name: target_of(member).kind.value for member in members}
    return [x for x in members if kinds[x.name] in ("function", "class") or path_of(x) in MODULES]


def target_of(member: griffe.Object | griffe.Alias) -> griffe.Object:
    return member.final_target if member.is_alias else member


def path_of(member: griffe.Object | griffe.Alias) -> str:
    """Where a member is defined."""
    return target_of(member).path


def documented(member: griffe.Object | griffe.Alias, name: str) -> Iterator[str]:
    """Heading, signature and text of a function or class."""
    thing, short = target_of(member), name.rpartition(".")[2]
    yield f"### `{name}`"
    if thing.kind.value == "function":
        for overload in thing.overloads or []:
            yield stub(signature(overload, short))
        yield stub(signature(thing, short))
        yield from text_of(thing)
        return
    yield stub(class_lines(thing, short))
    yield from text_of(thing)
    described = [f"- `{name}`: {text}" for name, _, text in attributes(thing) if text]
    if described:
        yield "**Attributes**"
        yield "\n".join(described)
    for method in methods(thing):
        yield f"#### `{short}.{method.name}`"
        yield stub(signature(method))
        yield from text_of(method)


def methods(thing: griffe.Class) -> list[griffe.Object]:
    """The documented methods and properties of a class, and its `__call__`; constructors stand with the class."""
    members = [x for x in thing.members.values() if not x.is_alias and x.docstring]
    return [
        x
        for x in members
        if not x.name.startswith("_") or x.name == "__call__"
        if x.kind.value == "function" or "property" in x.labels
    ]


# ---------------------------------------------------------------- signatures


def stub(code: str) -> str:
    """A block of signatures: Python without bodies."""
    return f"```pyi\n{code}\n```"


def signature(function: griffe.Function, name: str | None = None) -> str:
    """`def name(…) -> …: ...`, on one line if it fits."""
    if function.kind.value == "attribute":  # a property
        return f"@property\ndef {function.name}(self) -> {function.annotation}: ..."
    words, star, after_positional = [], False, False
    for parameter in function.parameters:
        kind = parameter.kind.value
        if after_positional and kind != "positional-only":
            words.append("/")
        after_positional = kind == "positional-only"
        if kind == "keyword-only" and not star:
            words.append("*")
        star = star or kind in ("keyword-only", "variadic positional")
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        default = "" if parameter.default is None or stars else f" = {parameter.default}"
        words.append(f"{stars}{parameter.name}{annotation}{default if annotation else default.replace(' ', '')}")
    decorator = "".join(f"@{label}\n" for label in ("classmethod", "staticmethod") if label in function.labels)
    start, end = f"def {name or function.name}(", f") -> {function.returns}: ..." if function.returns else "): ..."
    line = f"{start}{', '.join(words)}{end}"
    if len(line) > WIDTH:
        line = start + "".join(f"\n    {word}," for word in words) + f"\n{end}"
    return quoted(decorator + line)


def class_lines(thing: griffe.Class, name: str) -> str:
    """`class Name(Base):` with its annotated attributes and its constructor."""
    bases = ", ".join(str(base) for base in thing.bases)
    lines = [line for _, line, _ in attributes(thing)]
    constructor = thing.members.get("__init__")
    if constructor is not None and not constructor.is_alias and "dataclass" not in thing.labels:
        lines += signature(constructor).splitlines()
    body = "".join(f"\n    {line}" for line in lines) or " ..."
    decorator = "@dataclass\n" if "dataclass" in thing.labels else ""
    return quoted(f"{decorator}class {name}{f'({bases})' if bases else ''}:{body}")


def attributes(thing: griffe.Class) -> Iterator[tuple[str, str, str]]:
    """Name, line and description of the annotated attributes; the description is that of pydantic's `Field`."""
    for attribute in thing.members.values():
        if attribute.kind.value != "attribute" or attribute.name.startswith("_") or "property" in attribute.labels:
            continue
        if attribute.annotation is not None:
            default, description = field_of(attribute)
            yield attribute.name, f"{attribute.name}: {attribute.annotation}{default}", description


def field_of(attribute: griffe.Attribute) -> tuple[str, str]:
    """` = default` and description of an attribute; both may be in a call of `Field`."""
    if attribute.value is None:
        return "", ""
    call = ast.parse(str(attribute.value), mode="eval").body
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) in ("Field", "field")):
        return f" = {attribute.value}", ""
    words = {word.arg: word.value for word in call.keywords}
    default = call.args[0] if call.args else words.get("default")
    if "default_factory" in words:
        default = ast.Call(words["default_factory"], [], [])
    description = ast.literal_eval(words["description"]) if "description" in words else ""
    return "" if default is None else f" = {ast.unparse(default)}", description


def quoted(code: str) -> str:
    """Strings in double quotes, as the sources have them."""
    return re.sub(r"'([^'\"\n]*)'", r'"\1"', code)


# ---------------------------------------------------------------- docstrings


def text_of(thing: griffe.Object) -> Iterator[str]:
    """Paragraphs of a docstring: text as it stands, indented text and tables as blocks, sections as lists."""
    text = inspect.cleandoc(thing.docstring.value) if thing.docstring else ""
    title = None
    for paragraph in re.split(r"\n\s*\n", text):
        first, _, rest = paragraph.partition("\n")
        if first.rstrip(":") in SECTIONS and first.endswith(":"):
            title, paragraph = first[:-1], rest
            yield f"**{title}**"
        if not paragraph.startswith(" "):
            title = None
            yield block(paragraph) if re.search(r"\S {3,}\S", paragraph) else paragraph
        elif title in ("Returns", "Yields"):
            yield inspect.cleandoc(f"\n{paragraph}")
        elif title:
            yield entries(inspect.cleandoc(f"\n{paragraph}"))
        else:
            yield block(paragraph)


def block(text: str) -> str:
    return "\n".join(["```text", inspect.cleandoc(f"\n{text}"), "```"])


def entries(text: str) -> str:
    """`name: text` with indented further lines -> a list."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" "):
            items[-1] += f"\n  {line.strip()}"
        else:
            name, colon, rest = line.partition(": ")
            items.append(f"- `{name}`: {rest}" if colon else f"- {line}")
    return "\n".join(items)


if __name__ == "__main__":
    main()
